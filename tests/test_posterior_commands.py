"""``prune`` and ``calibrate`` on tiny trained runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM

from varshare_rl.assemble import load_agent
from varshare_rl.commands import prune
from varshare_rl.config import Device
from varshare_rl.run.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint


def read(path: str) -> dict[str, Any]:
    loaded = json.loads(Path(path).read_text())
    assert isinstance(loaded, dict)
    return loaded


def snapshot(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture(params=["ppo", "sac"])
def run(command_once: Callable[..., Path], request: pytest.FixtureRequest) -> str:
    settings = ("total_transitions=480", "elbo.start=narrow", "run_dir=run")
    return str(command_once("train", *TINY, *TINY_ALGORITHM[request.param], *settings))


def test_a_pruned_copy_can_be_evaluated_and_calibrated(command: Command, run: str) -> None:
    before = snapshot(run)
    outcome = command("prune", f"run={run}", "threshold=0.5", "device=cpu")
    assert outcome.code == 0, outcome.err
    assert snapshot(run) == before
    told = read("run_pruned/pruning.json")
    assert told["kept"] == told["units"]  # fresh posteriors are far narrower than their priors
    assert set(told["changes"]) == set(read("run/summary.json")["tasks"])
    assert all(row["action"]["largest"] == 0 == row["value"]["rms"] for row in told["changes"].values())
    for folder in (run, "run_pruned"):
        outcome = command("evaluate", f"run={folder}", "episodes=2")
        assert outcome.code == 0, outcome.err
    same, other = read("run/evaluation.json"), read("run_pruned/evaluation.json")
    assert same["tasks"] == other["tasks"]
    outcome = command("calibrate", "run=run_pruned", "episodes=1", "draws=2")
    assert outcome.code == 0, outcome.err
    shown = command("runs", "show", "run_pruned").out
    assert shown.startswith("run_pruned: pruned\n")
    assert "transitions  480 of 480" in shown
    assert "go on with" not in shown  # which is refused


def test_pruning_that_fails_leaves_nothing_in_its_own_way(
    command: Command, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prune, "write_json", fail)
        assert command("prune", f"run={run}", "device=cpu").code == 1
    assert [path.name for path in Path().iterdir()] == [run]
    assert command("prune", f"run={run}", "device=cpu").code == 0


def test_pruning_everything_leaves_the_shared_weights(command: Command, run: str) -> None:
    outcome = command("prune", f"run={run}", "threshold=1e9", "out=below/bare", "device=cpu")
    assert outcome.code == 0, outcome.err
    assert "kept 0 of" in outcome.out
    told = read("below/bare/pruning.json")
    assert (told["kept"], told["criterion"], told["threshold"]) == (0, "nats", 1e9)
    assert told["bytes_kept"] < told["bytes_dense"] / 50
    assert max(row["action"]["largest"] for row in told["changes"].values()) > 0
    outcome = command("evaluate", "run=below/bare", "episodes=2")
    assert outcome.code == 0, outcome.err
    nats = [row["kl"] for row in read("below/bare/evaluation.json")["tasks"].values()]
    assert nats == pytest.approx([0.0] * len(nats), abs=1e-3)


def test_the_best_checkpoint_and_signal_to_noise(command: Command, run: str) -> None:
    outcome = command("prune", f"run={run}", "checkpoint=best", "criterion=snr", "threshold=0.02", "out=small")
    assert outcome.code == 0, outcome.err
    told = read("small/pruning.json")
    assert told["checkpoint"].startswith("best-")
    assert 0 < told["kept"] < told["units"]
    assert command("evaluate", "run=small", "episodes=1").code == 0
    assert command("calibrate", "run=small", "episodes=1", "draws=2").code == 0


def test_the_best_checkpoint_is_calibrated_in_its_own_units(command: Command, run: str) -> None:
    (best,) = Path(run, "checkpoints").glob("best-*")
    last = load_checkpoint(find_checkpoint(Path(run)))
    state = load_checkpoint(best)
    assert load_agent(Path(run), "best", Device.cpu).algorithm.policy_state().keys() == state["algorithm"].keys()
    # both are of the end of the run: the same weights, and the same calibration if all it needs is there
    torch.testing.assert_close(state["algorithm"]["actor"], last["algorithm"]["actor"], rtol=0, atol=0)
    told = []
    for checkpoint in ("last", "best"):
        outcome = command("calibrate", f"run={run}", f"checkpoint={checkpoint}", "episodes=2", "draws=3")
        assert outcome.code == 0, outcome.err
        told.append(read("run/calibration.json"))
        assert told[-1]["conditions"]["checkpoint"].startswith(f"{checkpoint}-")
    assert told[0]["tasks"] == told[1]["tasks"]


def test_a_checkpoint_without_the_units_of_its_values_is_not_calibrated(command: Command, run: str) -> None:
    (best,) = Path(run, "checkpoints").glob("best-*")
    state = load_checkpoint(best)
    del state["algorithm"]["reward_scaler"]
    save_checkpoint(Path(run), "best", state["transitions"], state)
    assert command("prune", f"run={run}", "checkpoint=best", "out=small").code == 0
    for arguments in ((f"run={run}", "checkpoint=best"), ("run=small",)):
        outcome = command("calibrate", *arguments)
        assert outcome.code == 2
        assert "no reward statistics" in outcome.err


def test_calibration_has_its_figures_and_repeats(command: Command, run: str) -> None:
    outcome = command("calibrate", f"run={run}", "episodes=3", "draws=4", "device=cpu")
    assert outcome.code == 0, outcome.err
    assert "calibration error" in outcome.out
    told = read("run/calibration.json")
    assert set(told["tasks"]) == set(read("run/summary.json")["tasks"])
    for row in told["tasks"].values():
        assert row["rows"] == 3 * 40
        assert set(row["coverage"]) == {"0.5", "0.8", "0.9", "0.95"}
        assert row["mean_std"] > 0
    assert told["conditions"]["draws"] == 4
    assert Path("run/calibration.png").stat().st_size > 1000
    assert command("calibrate", f"run={run}", "episodes=3", "draws=4", "device=cpu").code == 0
    assert read("run/calibration.json") == told


@pytest.mark.parametrize("name", ["prune", "calibrate"])
def test_networks_without_posteriors_are_refused(command: Command, name: str) -> None:
    settings = (*TINY, *TINY_ALGORITHM["ppo"], "network=shared", "total_transitions=160", "run_dir=run")
    assert command("train", *settings).code == 0
    before = snapshot("run")
    outcome = command(name, "run=run")
    assert outcome.code == 2
    assert "network=shared" in outcome.err
    assert outcome.err.count("\n") == 1
    assert snapshot("run") == before
    assert not Path("run_pruned").exists()
