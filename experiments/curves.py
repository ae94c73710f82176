"""Learning curves of run folders as one picture.

    python -m experiments.curves experiments/first_runs/ppo.png runs/<a> runs/<b> --tag success

One panel per run: evaluation of every task and their mean against transitions.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from matplotlib.ticker import EngFormatter

from experiments.results import logged
from varshare_rl.files import write_atomically
from varshare_rl.reporting.figures import legend_below, new_figure, plain, plain_axes, styled, to_file
from varshare_rl.reporting.style import INK, PAGE, look

Curve = list[tuple[int, float]]


def read_curves(run_dir: Path, tag: str) -> dict[str, Curve]:
    """Points ``(transitions, value)`` of ``eval/<task>/<tag>`` by task and of the mean as ``mean``."""
    curves: dict[str, Curve] = defaultdict(list)
    for record in logged(run_dir):
        for name, value in record.items():
            parts = name.split("/")
            if parts[0] == "eval" and name.endswith(f"/{tag}"):
                curves[parts[1]].append((record["transitions"], value))
            elif name == f"eval/mean_{tag}":
                curves["mean"].append((record["transitions"], value))
    return curves


@styled
def draw(run_dirs: list[Path], tag: str, target: Path) -> None:
    """One panel per run folder, written to ``target``."""
    found = [read_curves(run_dir, tag) for run_dir in run_dirs]
    for run_dir, curves in zip(run_dirs, found, strict=True):
        if not curves:
            raise SystemExit(f"error: {run_dir} has no evaluations of {tag}; choose --tag success or return")
    tasks = list(dict.fromkeys(task for curves in found for task in curves if task != "mean"))
    figure = new_figure(PAGE, 2.8 + 0.06 * len(tasks))
    panels = figure.subplots(1, len(run_dirs), squeeze=False, sharey=tag != "return")[0]
    longest = max(curve[-1][0] for curves in found for curve in curves.values())
    lines = {}
    for axes, run_dir, curves in zip(panels, run_dirs, found, strict=True):
        for task, curve in curves.items():
            line = {"color": INK, "linewidth": 2.4} if task == "mean" else look(tasks.index(task)).line
            (lines[task],) = axes.plot(*zip(*curve, strict=True), **line)
        axes.set(title=plain(run_dir.name), xlabel="transitions, all tasks together", xlim=(0, longest))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        plain_axes(axes, grid="y")
    panels[0].set_ylabel(f"evaluation {tag}")
    legend_below(figure, list(lines.values()), list(lines))
    write_atomically(target, to_file(figure))


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the PNG to write")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--tag", default="success", help="success, success_final or return")
    arguments = parser.parse_args()
    draw(arguments.runs, arguments.tag, arguments.target)


if __name__ == "__main__":
    main()
