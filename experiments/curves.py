"""Learning curves of run folders as one picture.

    python -m experiments.curves experiments/first_runs/ppo.png runs/<a> runs/<b> --tag success

One panel per run: evaluation of every task and their mean against transitions.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Curve = list[tuple[int, float]]


def read_curves(run_dir: Path, tag: str) -> dict[str, Curve]:
    """Points ``(transitions, value)`` of ``eval/<task>/<tag>`` by task and of the mean as ``mean``."""
    curves: dict[str, Curve] = defaultdict(list)
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            parts = name.split("/")
            if parts[0] == "eval" and name.endswith(f"/{tag}"):
                curves[parts[1]].append((record["transitions"], value))
            elif name == f"eval/mean_{tag}":
                curves["mean"].append((record["transitions"], value))
    return curves


def draw(run_dirs: list[Path], tag: str, target: Path) -> None:
    """One panel per run folder, written to ``target``."""
    figure, axes = plt.subplots(1, len(run_dirs), figsize=(7.6 * len(run_dirs), 4.2), squeeze=False)
    found = [read_curves(run_dir, tag) for run_dir in run_dirs]
    for run_dir, curves in zip(run_dirs, found, strict=True):
        if not curves:
            raise SystemExit(f"error: {run_dir} has no evaluations of {tag}; choose --tag success or return")
    longest = max(curve[-1][0] for curves in found for curve in curves.values())
    for axis, run_dir, curves in zip(axes[0], run_dirs, found, strict=True):
        for task, curve in curves.items():
            style = {"color": "black", "linewidth": 2.5} if task == "mean" else {"linewidth": 1.2}
            axis.plot(*zip(*curve, strict=True), label=task, **style)
        axis.set(title=run_dir.name, xlabel="transitions, all tasks together", ylabel=f"evaluation {tag}")
        axis.grid(alpha=0.3)
        axis.set_xlim(0, longest)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


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
