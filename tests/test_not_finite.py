"""An environment gives NaN and infinity once: the run goes on as if it had not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from helpers import TINY_ALGORITHM

import varshare_rl as vs
from varshare_rl.run.checkpoint import find_checkpoint, load_checkpoint
from varshare_rl.run.evaluation import Evaluation


class Spoilt(gymnasium.Env[Any, Any]):
    """Rewards small actions; from ``start`` to ``stop`` of the steps of all of its kind it gives no numbers."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    steps, start, stop = 0, 0, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert np.isfinite(action).all()
        type(self).steps += 1
        obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        reward = -float(np.abs(action).sum())
        if self.start <= self.steps < self.stop:
            obs[0], reward = math.nan, math.inf
        return obs, reward, False, False, {}


class Well(Spoilt):
    """Never spoilt."""

    steps, start, stop = 0, 0, 0


def train(kind: str, start: int, stop: int, **options: Any) -> None:
    Spoilt.steps, Spoilt.start, Spoilt.stop = 0, start, stop
    vs.train(
        *TINY_ALGORITHM[kind], "network.hidden=[8]", "env.horizon=20", "env.envs_per_task=2", "device=cpu",
        "log.every=40", "evaluate.episodes=2", "run_dir=run", "total_transitions=800", "log.quiet=true",
        envs={"well": Well, "ill": Spoilt}, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("algorithm", "reward_scale"), [("ppo", "return_std"), ("ppo", "ars"), ("sac", "none")])
def test_a_run_goes_on_without_it(
    folder: Path, capsys: pytest.CaptureFixture[str], algorithm: str, reward_scale: str
) -> None:
    # before come 61 steps in which the environment is tried out
    choice = {"reward_scale": reward_scale, "normalize_observations": True}
    train(algorithm, 100, 104, algorithm=choice, evaluate={"every": 0})
    out = capsys.readouterr().out
    assert out.count("task ill gave an observation or a reward that is NaN or infinite") == 1
    assert "has diverged" not in out
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    counted = [line["not_finite/ill"] for line in lines if "not_finite/ill" in line]
    assert counted[-1] == 4.0
    assert not any("not_finite/well" in line or "divergence_guard/ill" in line for line in lines)
    losses = [value for line in lines for name, value in line.items() if name.startswith("loss/")]
    assert losses
    assert None not in losses
    returns = [line["train/ill/return"] for line in lines if "train/ill/return" in line]
    assert None not in returns
    state = load_checkpoint(find_checkpoint(Path("run")))["algorithm"]
    for part in ("normalizer", "reward_scaler", "actor", "critic"):
        assert all(value.isfinite().all() for value in state[part].values()), part


def test_a_first_evaluation_without_numbers_does_not_stay_the_best(folder: Path) -> None:
    """All steps are spoilt until after the first evaluation."""
    train("ppo", 1, 200, evaluate={"every": 160})
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    found = [line["eval/ill/return"] for line in lines if "eval/ill/return" in line]
    assert found[:2] == [None, None]  # that before the first step is of the same environments
    assert None not in found[2:]
    assert load_checkpoint(find_checkpoint(Path("run"), "best"))["transitions"] > 160


def test_scores_leave_out_tasks_without_a_number() -> None:
    def score(*returns: float) -> tuple[float, ...]:
        tasks = {str(i): {"return": value, "success": None} for i, value in enumerate(returns)}
        return Evaluation(tasks).score

    nan = math.nan
    assert score(nan, nan) < score(nan, -9.0) < score(nan, 3.0) < score(-5.0, -5.0) < score(-5.0, 1.0)
    assert score(math.inf, 1.0) == score(nan, 1.0)
