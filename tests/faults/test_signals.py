"""Signals to a run, its workers, or both, at every moment: nothing is lost beyond the last checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, TINY_ALGORITHM, last_of_each
from test_resume import assert_same, final_state, metrics, results

from varshare_rl.run.checkpoint import find_checkpoint, load_checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="looks processes up in /proc")

#: Four environments in two workers; a checkpoint, an evaluation and several updates in every third of the run.
RUN = last_of_each((
    *TINY, *TINY_ALGORITHM["ppo"], "env=gymnasium", "env.ids=[Pendulum-v1,Pendulum-v1]", "env.horizon=30",
    "env.workers=2", "log.every=40", "evaluate.every=160", "checkpoint.every=160", "total_transitions=480",
    "observe.every=0",
))  # fmt: skip

SAMPLE = (
    ("SIGTERM", "both", "evaluate"),
    ("SIGHUP", "parent", "update"),
    ("SIGKILL", "parent", "save"),
    ("SIGSTOP", "workers", "step"),
)
MOMENTS = ("start", "step", "update", "evaluate", "save")
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "SIGKILL": -9}


def drive(folder: Path, scenarios: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("driver.py")), "scenarios.json"],
        cwd=folder, capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(folder: Path, faults: tuple[tuple[str, str, str], ...]) -> None:
    """Strike every run, let it go on as a user would, and compare it with one that was left alone."""
    memory = shared_memory()
    scenarios = [{"arguments": [*RUN, "run_dir=whole"], "out": "whole.out", "fault": None}]
    for fault in faults:
        name = "-".join(fault)
        struck = dict(zip(("name", "target", "moment"), fault, strict=True))
        scenarios.append({"arguments": [*RUN, f"run_dir={name}"], "out": f"{name}.out", "fault": struck})
    first = drive(folder, scenarios)
    again = []
    for fault in faults:
        name = "-".join(fault)
        begun = (folder / name / "config.yaml").exists()
        if (folder / name / "summary.json").exists():
            continue
        arguments = [f"resume={name}"] if begun else [*RUN, f"run_dir={name}"]
        again.append({"arguments": arguments, "out": f"{name}.again", "fault": None})
    for outcome, scenario in zip(drive(folder, again), again, strict=True):
        assert outcome["code"] == 0, Path(folder / scenario["out"]).read_text()
    assert first[0]["code"] == 0, (folder / "whole.out").read_text()
    expected = final_state(folder / "whole")
    for fault, outcome in zip(faults, first[1:], strict=True):
        assert_survived(folder, fault, outcome)
        run_dir = folder / "-".join(fault)
        assert_same(final_state(run_dir), expected)
        assert metrics(run_dir) == metrics(folder / "whole")
        assert results(run_dir) == results(folder / "whole")
    assert shared_memory() <= memory


def shared_memory() -> set[str]:
    """Return what is in shared memory, without that of joblib, which other tests use at the same time."""
    names = os.listdir("/dev/shm") if Path("/dev/shm").exists() else []
    return {name for name in names if "loky" not in name and not name.startswith("joblib")}


def assert_survived(folder: Path, fault: tuple[str, str, str], outcome: dict[str, Any]) -> None:
    """The struck run ended as its signal says, or not at all, and left no process.

    Without workers it goes on from its last checkpoint, if there is one yet.
    """
    name, target, moment = fault
    out = (folder / f"{'-'.join(fault)}.out").read_text()
    assert outcome["orphans"] == [], out
    if name == "SIGSTOP" or (target == "workers" and name != "SIGKILL"):
        assert outcome["code"] == 0, out
    elif target == "workers":
        assert outcome["code"] == int(moment == "start"), out
        assert "died with exit code -9" in out
    else:
        assert outcome["code"] == CODES[name], out
        assert "Traceback" not in out
        if name != "SIGKILL":
            assert ("all saved" in out) == (moment != "start"), out


def test_a_sample(tmp_path: Path) -> None:
    check(tmp_path, SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["parent", "workers", "both"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL", "SIGSTOP"])
def test_a_days_worth(tmp_path: Path, name: str, target: str) -> None:
    check(tmp_path, tuple((name, target, moment) for moment in MOMENTS))


def test_a_signal_in_an_evaluation_ends_it_at_once(tmp_path: Path) -> None:
    """What is saved then knows that the evaluation is still to come."""
    fault = {"name": "SIGTERM", "target": "parent", "moment": "evaluate"}
    long = "evaluate.episodes=100000"
    scenario = {"arguments": last_of_each([*RUN, long, "run_dir=run"]), "out": "run.out", "fault": fault}
    assert [outcome["code"] for outcome in drive(tmp_path, [scenario])] == [143]
    state = load_checkpoint(find_checkpoint(tmp_path / "run"))
    assert (state["transitions"], state["evaluated_at"]) == (0, -1)
