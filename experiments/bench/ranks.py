"""Two ranks next to one process with as many threads and workers as there are cores, in training on MT10."""

from __future__ import annotations

from experiments.bench.contenders import Setting
from experiments.bench.report import Ratio, Section
from experiments.bench.runs import Outcome, train

#: Transitions between two lines of metrics, and overrides, by name.
RUNS: dict[str, tuple[int, list[str]]] = {
    "PPO, 2 x 128": (20_000, ["algorithm=ppo"]),
    "SAC, 3 x 400": (
        500,
        ["algorithm=sac", "algorithm.start_transitions_per_task=50", "network.hidden=[400,400,400]"],
    ),
}
WAYS = {"one process": 1, "two ranks": 2}


def run(rounds: int, setting: Setting) -> list[Section]:
    """In every round a run of each kind in each way, of four lines of metrics; the first interval is left out."""
    rates: dict[str, list[float]] = {f"{name}, {way}": [] for name in RUNS for way in WAYS}
    for _ in range(rounds):
        for name, (every, overrides) in RUNS.items():
            env = ["env=mt10", "env.envs_per_task=2"]
            if setting.quick:
                env, every = ["env=pointmass", "network.hidden=[8]"], 800
                overrides = [f"algorithm={name[:3].lower()}"]
            schedule = [
                f"total_transitions={4 * every}",
                f"log.every={every}",
                "evaluate.every=0",
                "observe.every=0",
            ]
            for way, ranks in WAYS.items():
                outcome = train([*env, *overrides, *schedule, "evaluate.episodes=1"], setting, ranks=ranks)
                rates[f"{name}, {way}"].append(_rate(outcome))
    ratios = [Ratio(f"{name}, two ranks", f"{name}, one process") for name in RUNS]
    return [Section("Training on MT10 by two ranks", "transitions/s", rates, ratios)]


def _rate(outcome: Outcome) -> float:
    lines = [line for line in outcome.lines if "time/share_update" in line]
    first, last = lines[0], lines[-1]
    return float((last["transitions"] - first["transitions"]) / (last["seconds"] - first["seconds"]))
