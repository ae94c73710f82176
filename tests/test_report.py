"""``python -m varshare_rl.report`` on runs that were just made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command
from helpers import TINY, TINY_ALGORITHM, continual_document, write_continual
from test_errors import assert_one_line

FIGURES = {"nats", "similarity", "distance", "layers", "posteriors"}


def train(command: Command, *overrides: str) -> None:
    outcome = command("train", *TINY, *TINY_ALGORITHM["ppo"], "total_transitions=640", "run_dir=run", *overrides)
    assert outcome.code == 0, outcome.err


def test_the_report_of_the_end_is_the_observation_at_the_end(command: Command, folder: Path) -> None:
    """One function makes both documents: the last update is that of the last transition here."""
    train(command, "observe.every=320")
    outcome = command("report", "sharing", "run=run")
    assert outcome.code == 0, outcome.err
    out = Path("run/report_sharing")
    assert {path.name for path in out.iterdir()} == {f"{name}.png" for name in FIGURES | {"conflict"}} | {
        "sharing.json"
    }
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in FIGURES)
    written = json.loads((out / "sharing.json").read_text())
    assert written == json.loads(Path("run/sharing/000000000640.json").read_text())
    assert written["tasks"][0] == "normal_left"


def test_another_checkpoint_and_folder(command: Command, folder: Path) -> None:
    train(command, "evaluate.every=320", "observe.every=0")
    outcome = command("report", "sharing", "run=run", "checkpoint=best", "out=elsewhere/deep")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in Path("elsewhere/deep").iterdir()} == {f"{name}.png" for name in FIGURES} | {
        "sharing.json"
    }
    assert not Path("run/report_sharing").exists()
    best = next(Path("run/checkpoints").glob("best-*")).name
    written = json.loads(Path("elsewhere/deep/sharing.json").read_text())
    assert written["transitions"] == int(best.partition("-")[2])
    assert written["conflict"] is None


def test_a_network_that_shares_everything_has_nothing_to_report(command: Command, folder: Path) -> None:
    train(command, "network=shared")
    outcome = command("report", "sharing", "run=run")
    assert_one_line(outcome.code, outcome.err, "network=shared")
    assert not Path("run/report_sharing").exists()


def test_an_output_folder_that_is_a_file(command: Command, folder: Path) -> None:
    train(command)
    Path("taken").write_text("mine")
    outcome = command("report", "sharing", "run=run", "out=taken")
    assert_one_line(outcome.code, outcome.err, "taken")


RUN_FIGURES = {"matrix.png", "tasks.png"}
COMPARISON = {"continual.json", "continual.csv", "measures.png", "bytes.png", "learning.png"}


def files(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_continual_runs_side_by_side(command: Command, folder: Path) -> None:
    """A sweep and single runs, against references of which one has the seed of a run."""
    for seed in range(2):
        write_continual(f"runs/sweep/s{seed}", continual_document(seed=seed, learnt=0.8 - 0.2 * seed))
        write_continual(f"runs/ewc=1,s{seed}", continual_document("ewc", seed=seed, lost=0.1))
    write_continual("runs/alone/s0", continual_document("scratch", seed=0, learnt=0.4))
    write_continual("runs/alone/s5", continual_document("scratch", seed=5, learnt=0.8))
    outcome = command(
        "report",
        "continual",
        "runs/sweep",
        "runs/ewc=1,s0",
        "runs/ewc=1,s1",
        "reference=runs/alone",
        "out=deep/there",
    )
    assert outcome.code == 0, outcome.err
    names = ["sweep_s0", "sweep_s1", "ewc=1,s0", "ewc=1,s1"]
    figures = {f"{name}/{figure}" for name in names for figure in RUN_FIGURES}
    assert files("deep/there") == COMPARISON | figures
    for figure in (*figures, "measures.png", "bytes.png", "learning.png"):
        assert (Path("deep/there") / figure).read_bytes().startswith(b"\x89PNG")
    written = json.loads(Path("deep/there/continual.json").read_text())
    assert [(run["label"], run["seed"]) for run in written["runs"]] == [
        ("finetune", 0), ("finetune", 1), ("ewc", 0), ("ewc", 1)
    ]  # fmt: skip
    finetune, ewc = written["methods"]
    assert finetune["performance"]["runs"] == pytest.approx([0.55, 0.35])
    # areas of 0.4 and 0.3 against the mean of 0.2 and 0.4, whatever the seeds: the ratio of means is 0.05 / 0.7
    assert finetune["forward_transfer"]["runs"] == pytest.approx([0.1 / 0.7, 0.0])
    assert finetune["forward_transfer"]["mean"] == pytest.approx(0.05 / 0.7)
    assert ewc["forgetting"]["mean"] == pytest.approx(0.05)
    assert written["references"] == ["runs/alone/s0", "runs/alone/s5"]
    assert "finetune" in outcome.out
    assert "0.35..0.55" in outcome.out
    assert "written: deep/there" in outcome.out
    assert "ewc,ewc,2," in Path("deep/there/continual.csv").read_text()


def test_one_continual_run_is_reported_in_its_own_folder(command: Command, folder: Path) -> None:
    write_continual("runs/one", continual_document(old=("x",)))
    outcome = command("report", "continual", "runs/one")
    assert outcome.code == 0, outcome.err
    assert files("runs/one/report_continual") == COMPARISON | RUN_FIGURES
    assert "old tasks" in outcome.out
    again = command("report", "continual", "runs/one", "reference=[runs/one]")
    assert again.code == 0, again.err
    written = json.loads(Path("runs/one/report_continual/continual.json").read_text())
    assert written["methods"][0]["forward_transfer"]["mean"] == pytest.approx(0.0)


def test_settings_of_a_method_are_told_apart(command: Command, folder: Path) -> None:
    for weight in (1, 100):
        write_continual(f"runs/{weight}", continual_document("ewc"), f"method: {{name: ewc, weight: {weight}}}\n")
    outcome = command("report", "continual", "runs/1", "runs/100")
    assert outcome.code == 0, outcome.err
    written = json.loads(Path("report_continual/continual.json").read_text())
    assert [row["label"] for row in written["methods"]] == ["ewc method.weight=1", "ewc method.weight=100"]


def test_continual_reports_that_are_refused_leave_nothing(command: Command, folder: Path) -> None:
    write_continual("runs/a", continual_document())
    write_continual("runs/b", continual_document(seed=1, tasks=("a", "c")))
    write_continual("runs/other", {"mean_success": 1.0})
    before = files(".")
    for arguments, named in (
        (("runs/a", "runs/b"), "runs/a and runs/b differ in tasks: a,b and a,c"),
        (("runs/a", "runs/other"), "runs/other is no continual run"),
        (("runs/a", "reference=runs/b"), "the reference lacks b"),
        (("runs/a", "reference=runs/nowhere"), "runs/nowhere"),
        (("runs/a", "out=runs/a/summary.json"), "cannot make the folder runs/a/summary.json"),
    ):
        outcome = command("report", "continual", *arguments)
        assert_one_line(outcome.code, outcome.err, named)
    assert files(".") == before
    assert not Path("report_continual").exists()
