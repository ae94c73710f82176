"""``python -m experiments.posterior_uses runs/<sweep> ...``: prune policies and check critics of finished runs.

Reads the run folders inside the given ones that have posteriors, writes ``uses.csv`` and prints its means.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from experiments.kl_sweep.__main__ import suite_name
from experiments.results import Row, average, finished_runs, grouped, markdown, number, write_csv
from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import TrainedAgent, load_agent
from varshare_rl.commands.calibrate import CalibrateConfig, calibrate_agent
from varshare_rl.commands.common import evaluation_engine
from varshare_rl.config import Device
from varshare_rl.nn.layer import posterior_layers
from varshare_rl.nn.parameters import total_kl
from varshare_rl.nn.prune import prune
from varshare_rl.run.evaluation import evaluate

#: Nats per Gaussian below which a component of a residual is dropped.
THRESHOLDS = (0.01, 0.03, 0.1)
COLUMNS = (
    "suite", "kl_weight", "seed", "nats", "score",
    *(f"{name}_{threshold:g}" for threshold in THRESHOLDS for name in ("kept", "tasks", "score")),
    "coverage_50", "coverage_90", "calibration_error", "git_commit",
)  # fmt: skip


def score(agent: TrainedAgent, episodes: int) -> float:
    """Mean success on the means of the weights; on cartpole the share of the 500 steps that the pole was up."""
    with evaluation_engine(agent, episodes, agent.config.seed) as engine:
        result = evaluate(agent.algorithm, agent.suite, engine, episodes, lambda: False)
    success = result.mean("success")
    steps = result.mean("episode_steps")
    assert steps is not None
    return round(steps / 500 if success is None or suite_name(agent.config).startswith("cartpole") else success, 4)


def pruned(agent: TrainedAgent, threshold: float, episodes: int) -> Row:
    """Prune the policy of an agent, for good: share of its components kept, tasks with any left, and the score."""
    kept = [layer.kept for layer in prune(agent.algorithm.trained_modules()["actor"], threshold).values()]
    by_task = torch.stack([part.flatten(1).sum(1) for part in kept]).sum(0)
    share = sum(int(part.sum()) for part in kept) / sum(part.numel() for part in kept)
    name = f"{threshold:g}"
    return {
        f"kept_{name}": round(share, 4),
        f"tasks_{name}": int((by_task > 0).sum()),
        f"score_{name}": score(agent, episodes),
    }


def read(run_dir: Path, episodes: int) -> Row | None:
    """One row of the table; None for a run without posteriors."""
    agent = load_agent(run_dir, "last", Device.cpu)
    if not isinstance(agent.algorithm, ActorCritic) or not any(posterior_layers(agent.algorithm.critic)):
        return None
    nats = total_kl(agent.algorithm.trained_modules()["actor"], len(agent.suite.task_names)).detach()
    summary = json.loads((run_dir / "summary.json").read_text())
    options = CalibrateConfig(run=str(run_dir), episodes=episodes, device=Device.cpu)
    critic = calibrate_agent(agent, run_dir, options)["mean"]
    row: Row = {
        "suite": suite_name(agent.config),
        "kl_weight": agent.config.elbo.kl_weight,
        "seed": agent.config.seed,
        "nats": round(float(nats.mean()), 3),
        "score": score(agent, episodes),
        "coverage_50": round(critic["coverage"]["0.5"], 4),
        "coverage_90": round(critic["coverage"]["0.9"], 4),
        "calibration_error": round(critic["calibration_error"], 4),
        "git_commit": summary["conditions"]["git_commit"],
    }
    for threshold in THRESHOLDS:  # each drops what the one before has left
        row |= pruned(agent, threshold, episodes)
    return row


def table(rows: list[Row]) -> str:
    """Means over seeds as Markdown."""
    kept = [f"kept, tasks, score at {threshold:g}" for threshold in THRESHOLDS]
    columns = ("suite", "kl_weight", "seeds", "nats", "score", *kept, "50 % covers", "90 % covers")
    rows = sorted(rows, key=lambda row: (str(row["suite"]), number(row, "kl_weight")))
    lines = []
    for (suite, weight), members in grouped(rows, "suite", "kl_weight").items():
        pruned_away = [
            f"{average(members, f'kept_{t:g}'):.3f}, {average(members, f'tasks_{t:g}'):.1f}, "
            f"{average(members, f'score_{t:g}'):.2f}"
            for t in THRESHOLDS
        ]
        lines.append(
            (
                suite,
                f"{float(weight):g}",
                f"{len(members)}",
                f"{average(members, 'nats'):,.0f}",
                f"{average(members, 'score'):.2f}",
                *pruned_away,
                f"{average(members, 'coverage_50'):.2f}",
                f"{average(members, 'coverage_90'):.2f}",
            )
        )
    return markdown(columns, lines)


def main() -> None:
    """Read all runs, and write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of sweeps")
    parser.add_argument("--episodes", type=int, default=16, help="of every task")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    rows = []
    for run_dir in finished_runs(given.folders):
        row = read(run_dir, given.episodes)
        if row is not None:
            rows.append(row)
            write_csv(given.folder / "uses.csv", COLUMNS, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
