"""Losses that are not finite, and environments and workers that fail: a run goes on, or ends in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM
from test_resume import assert_same, final_state, metrics

from varshare_rl.commands import attempts
from varshare_rl.envs.slots import Episode
from varshare_rl.optim.step import LossStep
from varshare_rl.run import loop
from varshare_rl.run.checkpoint import newest_checkpoint

RUN = (*TINY, *TINY_ALGORITHM["ppo"], "checkpoint.every=320", "total_transitions=1280", "log.quiet=false")


def spoil(monkeypatch: pytest.MonkeyPatch, tasks: slice, steps: Container[int]) -> None:
    """Make the losses of some tasks NaN in some of the steps from now on."""
    aggregate, count = LossStep.aggregate, 0

    def spoiled(self: LossStep, losses: torch.Tensor) -> None:
        nonlocal count
        if len(losses) > 1 and count in steps:
            losses = torch.cat([losses[tasks] * float("nan"), losses[tasks.stop :]])
        count += 1
        aggregate(self, losses)

    monkeypatch.setattr(LossStep, "aggregate", spoiled)


def test_stop_ends_at_the_first_loss_that_is_not_finite(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = command("train", *RUN, "run_dir=whole")
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        spoil(patch, slice(0, 2), range(20, 21))
        outcome = command("train", *RUN, "run_dir=run", "on_divergence=stop")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "the loss of far_left, far_right is not finite" in outcome.err or "is not finite" in outcome.err
    assert "go on from the last checkpoint with" in outcome.out
    assert "Diverged" in Path("run/failure.txt").read_text()
    again = command("train", "resume=run")
    assert again.code == 0, again.err
    assert_same(final_state(Path("run"))["algorithm"], final_state(Path("whole"))["algorithm"])
    assert metrics(Path("run")) == metrics(Path("whole"))


def test_rollback_goes_on_with_half_the_rate(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice from the same checkpoint: a quarter. What is learnt since is clean."""
    spoil(monkeypatch, slice(0, 1), (20, 24))
    outcome = command("train", *RUN, "run_dir=run", "on_divergence=rollback")
    assert outcome.code == 0, outcome.err
    assert "with 0.5 of the learning rate" in outcome.out.replace("\n", " ")
    assert "with 0.25 of the learning rate" in outcome.out.replace("\n", " ")
    state = newest_checkpoint(Path("run"))[1]
    assert [state["algorithm"][f"{name}_step"]["rate_factor"] for name in ("actor", "critic")] == [0.25, 0.25]
    assert state["algorithm"]["actor_step"]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(
        0.25 * command_rate(command)
    )
    counts = [line["transitions"] for line in metrics(Path("run"))]
    assert counts == sorted(counts)


def command_rate(command: Command) -> float:
    assert command("train", *RUN, "run_dir=plain").code == 0
    rate = newest_checkpoint(Path("plain"))[1]["algorithm"]["actor_step"]["optimizer"]["param_groups"][0]["lr"]
    return float(rate)


def test_the_best_of_an_abandoned_attempt_does_not_stay(command: Command) -> None:
    """It has replaced that of the attempt which goes on, whose next evaluation replaces it."""
    assert command("train", *RUN, "run_dir=run", "evaluate.every=320").code == 0
    (best,) = Path("run/checkpoints").glob("best-*")
    best.rename(best.with_name("best-000000099999"))
    assert command("train", "resume=run", "total_transitions=1920").code == 0
    (best,) = Path("run/checkpoints").glob("best-*")
    assert int(best.name.removeprefix("best-")) <= 1920
    assert command("evaluate", "run=run", "checkpoint=best", "episodes=1").code == 0


def test_a_run_that_diverges_again_and_again_ends(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, slice(0, 1), range(20, 100_000))
    outcome = command("train", *RUN, "run_dir=run", "on_divergence=rollback")
    assert outcome.code == 1
    assert outcome.out.count("going on from the checkpoint") == 2


def test_a_run_in_which_nothing_is_learnt_any_more_ends(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default, which leaves out tasks whose losses are not finite, when these are all of them."""
    spoil(monkeypatch, slice(0, 8), range(20, 100_000))
    monkeypatch.setattr(loop, "MOST_IDLE_STEPS", 5)
    outcome = command("train", *RUN, "run_dir=run")
    assert outcome.code == 1
    assert "no task has had a finite loss for 5 steps in a row" in outcome.err


BAD = """
import os
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv

class Bad(PendulumEnv):
    def reset(self, **given):
        self.steps = 0
        return super().reset(**given)

    def step(self, action):
        self.steps += 1
        if self.steps == 15 and os.path.exists("armed"):
            {fail}
        return super().step(action)

gymnasium.registry.pop("Bad-v0", None)
gymnasium.register("Bad-v0", Bad, max_episode_steps=30)
"""
BAD_RUN = (
    *TINY[1:], "env=gymnasium", "env.ids=[Pendulum-v1,bad:Bad-v0]", "env.horizon=30",
    "log.every=40", "checkpoint.every=80", "total_transitions=480", "observe.every=0", "log.quiet=false",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _unregistered() -> Iterator[None]:
    yield
    gymnasium.registry.pop("Bad-v0", None)


def bad_module(folder: Path, monkeypatch: pytest.MonkeyPatch, fail: str) -> None:
    """Make a module of an environment that fails when there is a file ``armed``, as it is from the start on."""
    (folder / "bad.py").write_text(BAD.format(fail=fail))
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("bad", None)


def arm_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    start = loop.Run.start

    def armed(self: loop.Run, *given: bool) -> None:
        start(self, *given)
        Path("armed").touch()

    monkeypatch.setattr(loop.Run, "start", armed)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_environment_that_always_fails_ends_the_run_with_its_name(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """After the same again, and without five of its episodes."""
    bad_module(folder, monkeypatch, 'raise OSError("the\\nsensor is gone")')
    arm_at_the_start(monkeypatch)
    outcome = command("train", *BAD_RUN, *TINY_ALGORITHM["ppo"], f"env.workers={workers}", "run_dir=run")
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: task bad:Bad-v0 fails with OSError: the sensor is gone (environment")
    assert outcome.out.count("going on from the checkpoint") == 1 + attempts.MOST_LEFT_OUT
    assert outcome.out.count("without that episode") == attempts.MOST_LEFT_OUT
    details = Path("run/failure.txt").read_text()
    assert "the\nsensor is gone" in details
    assert "bad.py" in details
    newest_checkpoint(Path("run"))  # is there to go on from


@pytest.mark.parametrize(
    ("workers", "fail", "algorithm"),
    [
        (1, 'raise OSError("gone")', "ppo"),
        pytest.param(1, 'raise OSError("gone")', "sac", marks=pytest.mark.slow),
        pytest.param(2, "os._exit(3)", "ppo", marks=pytest.mark.slow),
        (2, "os._exit(3)", "sac"),
    ],
)
def test_an_episode_that_fails_again_is_left_out(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int, fail: str, algorithm: str
) -> None:
    """The run goes on with the next, to its end; its checkpoints know of it."""
    second = Episode(np.random.SeedSequence((0, 0), spawn_key=(1, 1, 1)), None).integer_seed()
    bad_module(
        folder, monkeypatch, f"if self.np_random_seed != {second}: return super().step(action)\n            {fail}"
    )
    arm_at_the_start(monkeypatch)
    run = (*BAD_RUN, *TINY_ALGORITHM[algorithm], f"env.workers={workers}")
    outcome = command("train", *run, "run_dir=run")
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert said.count("going on from the checkpoint at") == 2
    assert said.count("without that episode") == 1
    assert "environment 1, episode 1" in said
    slot = newest_checkpoint(Path("run"))[1]["engine"]["slots"][3]  # the second environment of the second task
    assert slot["left_out"] == [1]
    assert slot["episode"] > 1
    more = command("train", "resume=run", "plugins=[bad]", "total_transitions=640")
    assert more.code == 0, more.err
    assert "warning" not in more.out


@pytest.mark.parametrize(
    "fail",
    [
        'raise OSError("gone")',
        pytest.param("os._exit(3)", marks=pytest.mark.slow),
        pytest.param("os.kill(os.getpid(), 11)", marks=pytest.mark.slow),
    ],
)
def test_a_failure_that_does_not_come_again_changes_nothing(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, fail: Any
) -> None:
    """The run goes on from its last checkpoint to the numbers of one without failure."""
    bad_module(folder, monkeypatch, f"os.remove('armed'); {fail}")
    run = (*BAD_RUN, *TINY_ALGORITHM["ppo"], "env.workers=2")
    assert command("train", *run, "run_dir=whole").code == 0
    arm_at_the_start(monkeypatch)
    outcome = command("train", *run, "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert not os.path.exists("armed")
    assert outcome.out.count("going on from the checkpoint") == 1
    assert_same(final_state(Path("run"))["algorithm"], final_state(Path("whole"))["algorithm"])
    assert metrics(Path("run")) == metrics(Path("whole"))
