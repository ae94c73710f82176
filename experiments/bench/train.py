"""End to end: transitions per second of training on MT10, and where the time goes."""

from __future__ import annotations

from itertools import pairwise

from experiments.bench.contenders import Setting
from experiments.bench.report import Goal, Section
from experiments.bench.runs import Outcome, train

#: Transitions between two lines of metrics (a whole rollout for PPO), and overrides, by name.
RUNS: dict[str, tuple[int, list[str]]] = {
    "PPO, default network": (20_000, ["algorithm=ppo"]),
    "PPO, 3 x 400": (20_000, ["algorithm=ppo", "network.hidden=[400,400,400]"]),
    "SAC, default network": (1_000, ["algorithm=sac", "algorithm.start_transitions_per_task=100"]),
    "SAC, 3 x 400": (
        500,
        ["algorithm=sac", "algorithm.start_transitions_per_task=100", "network.hidden=[400,400,400]"],
    ),
}


def run(rounds: int, setting: Setting) -> list[Section]:
    """One run of every kind; its intervals between two lines of metrics, from the second on, are the rounds."""
    goals = {"PPO, default network": Goal(2000, at_least=True)}
    rates: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    limits: dict[str, Goal] = {}
    for name, (every, overrides) in RUNS.items():
        env = "env=mt10"
        if setting.quick:
            env, every = "env=pointmass", 800
            overrides = ["algorithm.start_transitions_per_task=20"] if "SAC" in name else []
            overrides = [f"algorithm={name[:3].lower()}", *overrides, "network.hidden=[8]"]
            overrides += ["algorithm.rollout_transitions_per_task=100"] if "PPO" in name else []
        schedule = [f"total_transitions={every * (rounds + 2)}", f"log.every={every}", "evaluate.every=0"]
        outcome = train([env, *overrides, *schedule, "evaluate.episodes=1"], setting)
        rates[name] = _rates(outcome, rounds)
        for phase, share in _shares(outcome).items():
            shares[f"{name}: {phase}"] = [share]
            if phase == "rest":
                limits[f"{name}: {phase}"] = Goal(5.0)
    return [
        Section(
            "Training on MT10, VarShare-LoRA rank 8", "transitions/s", rates, goals={} if setting.quick else goals
        ),
        Section("Where the time goes", "% of training time", shares, goals=limits),
    ]


def _rates(outcome: Outcome, rounds: int) -> list[float]:
    """Transitions per second in each of the last ``rounds`` intervals."""
    lines = [line for line in outcome.lines if "time/share_update" in line][-rounds - 1 :]
    return [
        (after["transitions"] - before["transitions"]) / (after["seconds"] - before["seconds"])
        for before, after in pairwise(lines)
    ]


def _shares(outcome: Outcome) -> dict[str, float]:
    """Percentages of the training time by phase, the final evaluation not included."""
    last = [line for line in outcome.lines if "time/share_update" in line][-1]
    shares = {name.removeprefix("time/share_"): 100 * value for name, value in last.items() if "share_" in name}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
