"""Seconds from the training command to its first gradient step, and until an engine is ready."""

from __future__ import annotations

from experiments.bench.contenders import Setting
from experiments.bench.report import Goal, Section
from experiments.bench.runs import python, train

#: Ends the command at its first gradient step.
_STOP = """
from varshare_rl.optim.step import LossStep
def stop(self, losses):
    import os
    os._exit(0)
LossStep.__call__ = stop
"""

#: Makes an engine with one environment per task and resets it; without the clean-up that ends a process.
_READY = """
import os
from varshare_rl.envs.metaworld import MetaWorldConfig, MetaWorldSuite
engine = MetaWorldSuite(MetaWorldConfig(benchmark={benchmark!r}, envs_per_task=1)).make_engine(1, seed=0)
engine.reset()
engine.close()
os._exit(0)
"""
#: Seconds until each benchmark is ready.
_BENCHMARKS = {"mt10": Goal(4.0), "mt50": Goal(15.0)}


def run(rounds: int, setting: Setting) -> list[Section]:
    """MT10 with the defaults: PPO collects a whole rollout first, SAC its random start."""
    env = ["env=pointmass", "algorithm.rollout_transitions_per_task=40"] if setting.quick else ["env=mt10"]
    names = {"PPO": [*env, "algorithm=ppo"], "SAC": [env[0], "algorithm=sac"]}
    values: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(1 if setting.quick else rounds):
        for name, overrides in names.items():
            values[name].append(train(overrides, setting, _STOP).seconds)
    goals = {} if setting.quick else {name: Goal(12.0) for name in names}
    training = Section(f"Start of `train {env[0]}` to the first gradient step", "s", values, goals=goals)
    return [training, _engines(rounds, setting)]


def _engines(rounds: int, setting: Setting) -> Section:
    """From the start of Python to observations of all tasks, imports included."""
    goals = {"mt3": Goal(4.0)} if setting.quick else _BENCHMARKS
    values: dict[str, list[float]] = {name: [] for name in goals}
    for _ in range(1 if setting.quick else rounds):
        for name in goals:
            values[name].append(python(_READY.format(benchmark=name), setting).seconds)
    note = "One environment per task, as many workers as chosen automatically; from the start of Python."
    return Section("Engine ready", "s", values, goals=goals, notes=[note])
