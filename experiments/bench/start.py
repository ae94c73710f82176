"""Seconds from the training command to its first gradient step."""

from __future__ import annotations

from experiments.bench.contenders import Setting
from experiments.bench.report import Goal, Section
from experiments.bench.runs import train

#: Ends the command at its first gradient step.
_STOP = """
from varshare_rl.optim.step import LossStep
def stop(self, losses):
    import os
    os._exit(0)
LossStep.__call__ = stop
"""


def run(rounds: int, setting: Setting) -> list[Section]:
    """MT10 with the defaults: PPO collects a whole rollout first, SAC its random start."""
    env = ["env=pointmass", "algorithm.rollout_transitions_per_task=40"] if setting.quick else ["env=mt10"]
    names = {"PPO": [*env, "algorithm=ppo"], "SAC": [env[0], "algorithm=sac"]}
    values: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(1 if setting.quick else rounds):
        for name, overrides in names.items():
            values[name].append(train(overrides, setting, _STOP).seconds)
    goals = {} if setting.quick else {name: Goal(12.0) for name in names}
    return [Section(f"Start of `train {env[0]}` to the first gradient step", "s", values, goals=goals)]
