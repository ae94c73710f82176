"""Read the runs of sweeps over ``elbo.kl_weight`` and write ``sweep.csv`` and ``sweep.png``."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

from experiments.results import finished_runs, write_csv
from varshare_rl.assemble import load_agent
from varshare_rl.config import Device
from varshare_rl.run.sharing import sharing_document

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLUMNS = (
    "suite", "network", "prior_scale", "kl_weight", "seed", "success", "return", "nats", "sharing", "transitions",
    "seconds", "git_commit",
)  # fmt: skip
MEASURES = {"success": "success", "nats": "nats per task", "sharing": "sharing ratio"}

Row = dict[str, object]


def read(run_dir: Path) -> Row:
    """One row of the CSV from a run folder."""
    summary = json.loads((run_dir / "summary.json").read_text())
    agent = load_agent(run_dir, "last", Device.cpu)
    document = sharing_document(agent.algorithm.trained_modules(), agent.suite.task_names, 0)
    tasks = summary["tasks"].values()
    return {
        "suite": agent.config.env.name,
        "network": agent.config.network.name,
        "prior_scale": agent.config.elbo.prior_scale,
        "kl_weight": agent.config.elbo.kl_weight,
        "seed": agent.config.seed,
        "success": round(summary["mean_success"], 4),
        "return": round(summary["mean_return"], 3),
        "nats": round(mean(task["kl"] for task in tasks), 3),
        "sharing": round(document["sharing"], 5),
        "transitions": summary["transitions"],
        "seconds": round(summary["seconds"]),
        "git_commit": summary["conditions"]["git_commit"],
    }


def number(row: Row, name: str) -> float:
    """A column as a number."""
    return float(str(row[name]))


def draw(path: Path, rows: Sequence[Row]) -> None:
    """One column of panels per suite, one row per measure; lines are means over seeds, dots are runs."""
    suites = sorted({str(row["suite"]) for row in rows}, key=("pointmass", "cartpole", "metaworld").index)
    figure, axes = plt.subplots(len(MEASURES), len(suites), figsize=(4.6 * len(suites), 8.4), squeeze=False)
    for column, suite in enumerate(suites):
        groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
        for row in rows:
            if row["suite"] == suite:
                groups[str(row["network"]), number(row, "prior_scale")].append(row)
        for line, (measure, label) in enumerate(MEASURES.items()):
            axis = axes[line][column]
            for index, ((network, prior), group) in enumerate(sorted(groups.items())):
                weights = sorted({number(row, "kl_weight") for row in group})
                # a logarithmic axis has no place for 0: it stands left of the smallest weight
                places = {weight: weight or 1e-3 for weight in weights}
                points = [[number(row, measure) for row in group if number(row, "kl_weight") == w] for w in weights]
                name = f"{network}, prior {prior:g}"
                axis.plot([places[w] for w in weights], [mean(p) for p in points], label=name, color=f"C{index}")
                for weight, values in zip(weights, points, strict=True):
                    axis.scatter([places[weight]] * len(values), values, s=9, alpha=0.5, color=f"C{index}")
            axis.set_xscale("log")
            if measure == "nats":
                axis.set_yscale("symlog", linthresh=1.0)
                axis.set_ylim(bottom=0.0)
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            if line == 0:
                axis.set_title(suite)
            if line == len(MEASURES) - 1:
                axis.set_xlabel("kl_weight (0 at 0.001)")
        axes[0][column].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Collect what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m experiments.kl_sweep")
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--folder", type=Path, default=Path("experiments/kl_sweep"))
    arguments = parser.parse_args()
    runs = finished_runs(arguments.sweeps)
    if not runs:
        raise SystemExit("error: no finished run in these folders; give folders of sweeps")
    rows = [read(run) for run in runs]
    rows.sort(key=lambda row: (*(str(row[name]) for name in COLUMNS[:3]), *(number(row, n) for n in COLUMNS[3:5])))
    write_csv(arguments.folder / "sweep.csv", COLUMNS, rows)
    draw(arguments.folder / "sweep.png", rows)


if __name__ == "__main__":
    main()
