"""The reliability diagram of a critic's posterior."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from varshare_rl.reporting.figures import new_figure


def draw_reliability(result: Mapping[str, Any], target: Path) -> None:
    """Draw observed against nominal coverage of every task, their mean, and the diagonal of a calibrated critic."""
    figure = new_figure(5.2, 4.8)
    axis = figure.add_subplot()
    axis.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
    many = len(result["tasks"]) > 10
    for name, row in result["tasks"].items():
        axis.plot(result["levels"], row["curve"], linewidth=1, alpha=0.7, label=None if many else name)
    axis.plot(result["levels"], result["mean"]["curve"], color="black", linewidth=2, label="mean over tasks")
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal coverage", ylabel="observed coverage")
    axis.set_title("Returns within the critic's intervals (weights' noise alone)", fontsize=10)
    axis.legend(fontsize=7, loc="upper left")
    figure.savefig(target, dpi=120)
