"""``runs``: what it says of run folders, and what it removes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command
from helpers import TINY, TINY_ALGORITHM
from test_errors import assert_one_line

from varshare_rl.run.folder import held_folder


@pytest.fixture
def runs(command: Command, command_once: Callable[..., Path]) -> Path:
    """A run that is done and one that was stopped, in a folder with a folder of its own and one that is no run."""
    settings = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=320", "run_dir=runs/sweep/done")
    done = command_once("train", *settings)
    stopped = Path("runs/stopped")
    (stopped / "checkpoints").mkdir(parents=True)
    config = (done / "config.yaml").read_text().replace("total_transitions: 320", "total_transitions: 1000")
    (stopped / "config.yaml").write_text(config)
    lines = [{"transitions": 0, "seconds": 0.5, "eval/mean_success": 0.25}, {"transitions": 250, "seconds": 61.2}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (stopped / "metrics.jsonl").write_text(text + '{"transitions": 2')
    Path("runs/notes").mkdir()
    Path("runs/notes/config.yaml").write_text("a: 1\n")
    return Path("runs")


def table(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip().startswith("runs/")}


def test_the_list_says_state_and_results(command: Command, runs: Path) -> None:
    outcome = command("runs", "list")
    assert outcome.code == 0, outcome.err
    rows = table(outcome.out)
    assert list(rows) == ["runs/stopped", "runs/sweep/done"]
    assert rows["runs/stopped"] == ["stopped", "0.25", "-", "250", "(25", "%)", "0:01:01"]
    summary = json.loads(Path("runs/sweep/done/summary.json").read_text())
    assert rows["runs/sweep/done"][:2] == ["done", f"{summary['mean_success']:.2f}"]
    assert rows["runs/sweep/done"][3] == "320"
    with held_folder(runs / "stopped"):
        assert table(command("runs", "list", "runs").out)["runs/stopped"][0] == "running"
    assert command("runs", "list", "runs/notes").out == "no runs in runs/notes\n"


def test_show_says_what_a_run_is(command: Command, runs: Path) -> None:
    outcome = command("runs", "show", "runs/sweep/done")
    assert outcome.code == 0, outcome.err
    for part in ("done", "pointmass ppo varshare_lora, seed 0", "320 of 320", "normal_left", "summary.json"):
        assert part in outcome.out
    out = command("runs", "show", "runs/stopped").out
    assert "250 of 1,000 in 0:01:01" in out
    assert "go on with: python -m varshare_rl.train resume=runs/stopped" in out


def test_rm_asks_and_refuses(command: Command, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {
        ("rm",): "rm takes run folders",
        ("rm", "runs/stopped"): "nobody can answer here; add yes=true",
        ("rm", "runs/notes", "yes=true"): "runs/notes is no run folder",
        ("rm", "runs", "runs/stopped", "--yes"): "runs is no run folder",
        ("rm", "runs/gone", "--yes"): "no folder runs/gone",
        ("remove", "runs/stopped"): "unknown word 'remove'; there is list, show, rm",
        ("show",): "show takes one run folder",
    }
    for arguments, words in refused.items():
        outcome = command("runs", *arguments)
        assert_one_line(outcome.code, outcome.err, words)
    with held_folder(runs / "stopped"):
        outcome = command("runs", "rm", "runs/sweep/done", "runs/stopped", "yes=true")
        assert_one_line(outcome.code, outcome.err, "runs/stopped is running")
    assert (runs / "stopped" / "config.yaml").exists()
    assert (runs / "sweep" / "done" / "config.yaml").exists()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n" if "remove 1 run, 0.0 MB?" in question else "y")
    assert "nothing was removed" in command("runs", "rm", "runs/stopped").out
    assert (runs / "stopped" / "config.yaml").exists()
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert command("runs", "rm", "runs/stopped").code == 0
    assert command("runs", "rm", "runs/sweep/done", "yes=true").out == "removed: runs/sweep/done\n"
    assert sorted(path.name for path in runs.rglob("*")) == ["config.yaml", "notes", "sweep"]
