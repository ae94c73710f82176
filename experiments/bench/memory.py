"""Peak memory of training on MT10 and of the engine of MT50, workers included."""

from __future__ import annotations

from experiments.bench.contenders import Setting
from experiments.bench.report import Goal, Section
from experiments.bench.runs import python, train

#: One episode of every task of MT50, one environment each.
_EPISODE = """
import numpy as np
from varshare_rl.envs.metaworld import MetaWorldConfig, MetaWorldSuite
engine = MetaWorldSuite(MetaWorldConfig(benchmark="mt50", envs_per_task=1)).make_engine(1, seed=0)
engine.reset()
for _ in range(501):
    engine.step(np.zeros((50, 1, 4), dtype=np.float32))
engine.close()
"""
_GB = 1e9 / 2**30  # in GiB


def run(rounds: int, setting: Setting) -> list[Section]:
    """One short run of each algorithm. Replay memory is preallocated, but pages count once they are written."""
    del rounds  # memory does not vary
    env, total = ("env=pointmass", 800) if setting.quick else ("env=mt10", 24_000)
    names = {"PPO": ["algorithm=ppo"], "SAC": ["algorithm=sac", "algorithm.updates_per_transition_per_task=0.01"]}
    values: dict[str, list[float]] = {}
    for name, overrides in names.items():
        schedule = [f"total_transitions={total}", "evaluate.every=0", "evaluate.episodes=1", "checkpoint.every=0"]
        values[name] = [train([env, *overrides, *schedule], setting).peak_gib]
    if not setting.quick:
        values["engine of mt50"] = [python(_EPISODE, setting).peak_gib]
    goals = {} if setting.quick else {"SAC": Goal(1.5 * _GB), "engine of mt50": Goal(3 * _GB)}
    note = "Proportional set size of all processes, what they share counted once, highest of samples every 50 ms."
    return [Section(f"Peak memory of training, {env}", "GiB", values, goals=goals, notes=[note])]
