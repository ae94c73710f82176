"""Read runs with both precisions of matrix products and write ``precision.csv`` and ``precision.png``."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from experiments.curves import Curve, read_curves
from experiments.results import finished_runs, write_csv
from varshare_rl.config import load_config
from varshare_rl.files import write_atomically
from varshare_rl.reporting.figures import legend_below, new_figure, plain_axes, styled, to_file
from varshare_rl.reporting.style import PAGE, look

COLUMNS = (
    "suite", "matmul_precision", "seed", "success", "mean_of_curve", "transitions", "git_commit"
)  # fmt: skip


def read(run_dir: Path) -> tuple[dict[str, object], Curve]:
    """One row of the CSV from a run folder, and its curve of mean success."""
    summary = json.loads((run_dir / "summary.json").read_text())
    config, curve = load_config(run_dir / "config.yaml"), read_curves(run_dir, "success")["mean"]
    row = {
        "suite": config.env.name,
        "matmul_precision": config.matmul_precision.value,
        "seed": config.seed,
        "success": round(summary["mean_success"], 4),
        "mean_of_curve": round(mean(value for _, value in curve), 4),
        "transitions": summary["transitions"],
        "git_commit": summary["conditions"]["git_commit"],
    }
    return row, curve


@styled
def draw(path: Path, curves: dict[tuple[str, str], list[Curve]]) -> None:
    """A panel per suite: thin lines of runs, thick ones of their means."""
    suites = sorted({suite for suite, _ in curves})
    figure = new_figure(PAGE, 2.6)
    axes = figure.subplots(1, len(suites), squeeze=False)[0]
    means = {precision: look(index) for index, precision in enumerate(("highest", "bf16"))}
    for axis, suite in zip(axes, suites, strict=True):
        for precision, seen in means.items():
            runs = curves[suite, precision]
            for run in runs:
                axis.plot(*zip(*run, strict=True), color=seen.colour, linewidth=0.6, alpha=0.4)
            shortest = min(runs, key=len)
            middle = [mean(run[index][1] for run in runs) for index in range(len(shortest))]
            axis.plot([place for place, _ in shortest], middle, linewidth=2.2, **seen.line)
        axis.set(
            title=f"{suite}, {len(runs)} runs each", xlabel="transitions, all tasks together", ylabel="success"
        )
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        plain_axes(axis, grid="y")
    legend_below(figure, [Line2D([], [], **seen.line) for seen in means.values()], list(means))
    write_atomically(path, to_file(figure))


def main() -> None:
    """Collect what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m experiments.precision")
    parser.add_argument("runs", type=Path, nargs="+", help="folders that hold run folders")
    parser.add_argument("--folder", type=Path, default=Path("experiments/precision"))
    arguments = parser.parse_args()
    found = finished_runs(arguments.runs)
    if not found:
        raise SystemExit("error: no finished run in these folders; give folders that hold run folders")
    rows, curves = [], defaultdict(list)
    for run_dir in found:
        row, curve = read(run_dir)
        rows.append(row)
        curves[str(row["suite"]), str(row["matmul_precision"])].append(curve)
    write_csv(arguments.folder / "precision.csv", COLUMNS, rows)
    draw(arguments.folder / "precision.png", curves)


if __name__ == "__main__":
    main()
