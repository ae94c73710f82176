"""``python -m varshare_rl.report`` on runs that were just made."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Command
from helpers import TINY, TINY_ALGORITHM
from test_errors import assert_one_line

FIGURES = {"nats", "similarity", "distance", "layers", "posteriors"}


def train(command: Command, *overrides: str) -> None:
    outcome = command("train", *TINY, *TINY_ALGORITHM["ppo"], "total_transitions=640", "run_dir=run", *overrides)
    assert outcome.code == 0, outcome.err


def test_the_report_of_the_end_is_the_observation_at_the_end(command: Command, folder: Path) -> None:
    """The same document from the same function: the last update is that of the last transition here."""
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
