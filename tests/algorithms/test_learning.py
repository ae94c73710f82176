"""Agents that really learn, on the suites that take seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import Command

#: Two goals under two dynamics: a policy blind to its task succeeds in half of them at most.
FOUR = ("env=pointmass", "env.tasks=[normal_left,normal_right,flipped_down,flipped_up]", "network.hidden=[64,64]")
QUICK = {
    "ppo": (
        "algorithm=ppo", "env.envs_per_task=16", "algorithm.rollout_transitions_per_task=512",
        "algorithm.epochs=10", "algorithm.minibatches=4", "algorithm.learning_rate=3e-3",
        "algorithm.critic_learning_rate=3e-3", "algorithm.normalize_observations=false",
        "algorithm.entropy_weight=0.02", "algorithm.min_log_std=-1", "total_transitions=140000",
    ),
    "sac": (
        "algorithm=sac", "env.envs_per_task=4", "algorithm.replay_capacity_per_task=10000",
        "algorithm.batch_per_task=64", "algorithm.start_transitions_per_task=400",
        "algorithm.updates_per_transition_per_task=0.25", "algorithm.learning_rate=3e-3",
        "algorithm.critic_learning_rate=3e-3", "algorithm.entropy_learning_rate=3e-3",
        "algorithm.initial_entropy_coefficient=0.1", "algorithm.discount=0.95", "total_transitions=34000",
    ),
}  # fmt: skip


def train(command: Command, *overrides: str) -> dict[str, Any]:
    settings = ("evaluate.every=0", "evaluate.episodes=16", "log.quiet=true", "device=cpu", "run_dir=run")
    outcome = command("train", *overrides, *settings)
    assert outcome.code == 0, outcome.err
    summary: dict[str, Any] = json.loads(Path("run/summary.json").read_text())
    return summary


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("sac", marks=pytest.mark.slow)])
def test_point_masses_that_conflict(command: Command, algorithm: str) -> None:
    summary = train(command, *FOUR, *QUICK[algorithm])
    assert summary["mean_success"] >= 0.9, summary["tasks"]


#: One task three times, with rewards of different size.
COPIES = ("normal_left", "normal_left_2", "normal_left_3")
AT_THREE_SCALES = (
    "env=pointmass", f"env.tasks=[{','.join(COPIES)}]", "env.reward_scales=[1,100,10000]",
    "algorithm.reward_scale=none",
)  # fmt: skip
BUDGET = {
    "ppo": ("algorithm=ppo", "total_transitions=120000", "evaluate.every=20000"),
    "sac": ("algorithm=sac", "total_transitions=20000", "evaluate.every=4000"),
}


def curves(command: Command, name: str, *overrides: str) -> npt.NDArray[np.float64]:
    """Success of every copy at every evaluation, ``[points, copies]``."""
    settings = ("evaluate.episodes=16", "log.quiet=true", "device=cpu", f"run_dir={name}")
    outcome = command("train", *AT_THREE_SCALES, *overrides, *settings)
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
    points = [[row[f"eval/{copy}/success"] for copy in COPIES] for row in rows if "eval/mean_success" in row]
    return np.array(points)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", BUDGET)
def test_popart_learns_rewards_of_any_size_equally_fast(command: Command, algorithm: str) -> None:
    """And without it some of them are not learnt, since nothing else here scales them."""
    runs = {
        popart: np.stack(
            [
                curves(command, f"{popart}_{seed}", *BUDGET[algorithm], f"critic.popart={popart}", f"seed={seed}")
                for seed in (0, 1, 2)
            ]
        )
        for popart in (True, False)
    }  # [seeds, points, copies]
    assert runs[True][:, -1].mean(0).min() >= 0.9, runs
    assert np.ptp(runs[True].mean((0, 1))) <= 0.2, runs  # over all points, as a measure of speed
    assert runs[False][:, -1].mean(0).min() <= 0.5, runs


@pytest.mark.slow
@pytest.mark.parametrize("network", ["varshare", "shared", "independent"])
@pytest.mark.parametrize("algorithm", QUICK)
def test_the_other_architectures_learn_too(command: Command, algorithm: str, network: str) -> None:
    longer = {"ppo": "total_transitions=300000", "sac": "total_transitions=50000"}
    summary = train(command, *FOUR, *QUICK[algorithm], f"network={network}", longer[algorithm])
    assert summary["mean_success"] >= 0.9, summary["tasks"]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_all_point_masses_with_the_settings_in_configs(command: Command, algorithm: str) -> None:
    summary = train(command, "env=pointmass", f"algorithm={algorithm}")
    assert summary["mean_success"] >= 0.95, summary["tasks"]


@pytest.mark.slow
def test_cart_poles_with_the_settings_in_configs(command: Command) -> None:
    summary = train(command, "env=cartpole")
    assert summary["mean_return"] >= 450, summary["tasks"]
