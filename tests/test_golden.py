"""Golden traces: the numbers of a tiny run, kept in ``golden.json``.

A change of these is a change of results. If it is meant, renew the file with
``python tests/test_golden.py`` and say why in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import build, collect

from varshare_rl.algorithms.ppo import PPOConfig
from varshare_rl.algorithms.sac import SACConfig
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.run.loop import read_scalars
from varshare_rl.run.process import seed_everything

GOLDEN = Path(__file__).with_name("golden.json")
ALGORITHMS = {
    "ppo": PPOConfig(rollout_transitions_per_task=40, epochs=2, minibatches=2),
    "sac": SACConfig(
        start_transitions_per_task=20,
        batch_per_task=8,
        replay_capacity_per_task=100,
        updates_per_transition_per_task=0.25,
    ),
}


def trace(name: str) -> list[dict[str, float]]:
    """The scalars of the first four updates."""
    seed_everything(0)
    suite, engine, learner = build(PointMassConfig(envs_per_task=4), ALGORITHMS[name])
    obs = torch.from_numpy(engine.reset())
    seen: list[dict[str, float]] = []
    while len(seen) < 4:
        obs = collect(engine, learner, obs, 1)
        while learner.ready():
            seen.append(read_scalars(learner.update(), suite.task_names))
    return seen[:4]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_first_updates_give_the_kept_numbers(name: str) -> None:
    expected = json.loads(GOLDEN.read_text())[name]
    for update, (now, then) in enumerate(zip(trace(name), expected, strict=True)):
        assert now == pytest.approx(then, rel=2e-3, abs=2e-5), f"update {update}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps({name: trace(name) for name in ALGORITHMS}, indent=1) + "\n")
