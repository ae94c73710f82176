"""Peak memory of training on MT10, workers included."""

from __future__ import annotations

from experiments.bench.contenders import Setting
from experiments.bench.report import Goal, Section
from experiments.bench.runs import train


def run(rounds: int, setting: Setting) -> list[Section]:
    """One short run of each algorithm. Replay memory is preallocated, but pages count once they are written."""
    del rounds  # memory does not vary
    env, total = ("env=pointmass", 800) if setting.quick else ("env=mt10", 24_000)
    names = {"PPO": ["algorithm=ppo"], "SAC": ["algorithm=sac", "algorithm.updates_per_transition_per_task=0.01"]}
    values: dict[str, list[float]] = {}
    for name, overrides in names.items():
        schedule = [f"total_transitions={total}", "evaluate.every=0", "evaluate.episodes=1", "checkpoint.every=0"]
        values[name] = [train([env, *overrides, *schedule], setting).peak_gib]
    goals = {} if setting.quick else {"SAC": Goal(1.5)}
    note = "Proportional set size of all processes, what they share counted once, highest of samples every 50 ms."
    return [Section(f"Peak memory of training, {env}", "GiB", values, goals=goals, notes=[note])]
