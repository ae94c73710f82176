"""The reliability diagram of a critic's posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from varshare_rl.reporting.figures import legend_below, new_figure, plain_axes, styled
from varshare_rl.reporting.style import COLUMN, INK, look

#: More tasks are thin grey lines without names.
MOST_NAMED = 12


@styled
def calibration_figure(result: Mapping[str, Any]) -> Figure:
    """Draw observed against nominal coverage of every task, their mean, and the diagonal of a calibrated critic."""
    named = len(result["tasks"]) <= MOST_NAMED
    figure = new_figure(COLUMN, 3.2 + 0.16 * (-(-len(result["tasks"]) // 2) if named else 1))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":")
    handles, labels = [Line2D([], [], color="0.6", linewidth=1, linestyle=":")], ["calibrated"]
    for index, (name, row) in enumerate(result["tasks"].items()):
        line = look(index).line if named else {"color": "0.7"}
        (handle,) = axes.plot(result["levels"], row["curve"], linewidth=1, alpha=0.8, **line)
        if named or index == 0:
            handles.append(handle)
            labels.append(name if named else "tasks")
    handles += axes.plot(result["levels"], result["mean"]["curve"], color=INK, linewidth=2.2)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal coverage", ylabel="observed coverage", aspect="equal")
    plain_axes(axes, grid="both")
    legend_below(figure, handles, [*labels, "mean over tasks"])
    figure.suptitle("Returns within the critic's intervals\n(the weights' noise alone)")
    return figure
