"""Figures of continual learning: of a run, from its document, and of methods beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator

from varshare_rl.reporting.continual_measures import Document, Values, document_results
from varshare_rl.reporting.figures import (
    draw_heat_map,
    grid_of_panels,
    legend_below,
    log_axis,
    new_figure,
    plain,
    plain_axes,
    styled,
)
from varshare_rl.reporting.statistics import mean_band
from varshare_rl.reporting.style import INK, PAGE, QUALITATIVE, Look, look

Row = Mapping[str, Any]

#: The sequences of the literature have up to 20 tasks (CW20), whose numbers still fit into their cells.
ANNOTATED = 24
#: Labels of the measures that methods are compared by, as far as there are numbers.
COMPARED = {
    "performance": "performance P",
    "forgetting": "forgetting F",
    "forward_transfer": "forward transfer FT",
    "old_change": "change of old tasks",
}


@styled
def run_figures(document: Document) -> dict[str, Figure]:
    """Draw ``matrix``, every task after every task, and ``tasks``, the same as lines."""
    return {"matrix": matrix_figure(document), "tasks": tasks_figure(document)}


def matrix_figure(document: Document) -> Figure:
    """Draw results as a heat map: a row per moment, a column per task, frames where a task has just been learnt."""
    name, matrix = document_results(document)
    old = document["old_tasks"]
    figure = new_figure(3.4 + 0.46 * matrix.shape[1], 2.4 + 0.34 * len(matrix))
    axes = figure.subplots()
    low, high = (0.0, 1.0) if name == "success" else _range(matrix)
    draw_heat_map(axes, matrix, _moments(document), document["tasks"], low, high, name, annotated=ANNOTATED)
    for index in range(len(matrix) - 1):
        corner = (old + index - 0.5, index + 0.5)
        frame = Rectangle(corner, 1.0, 1.0, fill=False, edgecolor=QUALITATIVE[1], linewidth=1.8, zorder=3)
        axes.add_patch(frame)
    if old:
        axes.axvline(old - 0.5, color=INK, linewidth=1.6)
    axes.set_ylabel("after learning")
    return _titled(figure, document, f"Each task's {name} after each task of the sequence")


def tasks_figure(document: Document) -> Figure:
    """Draw a panel per task over the sequence, dashed until it is learnt, and the mean of those learnt by then."""
    name, matrix = document_results(document)
    old, tasks = document["old_tasks"], document["tasks"]
    number = len(tasks) + (len(matrix) > 2)
    across = min(number, 4 if number <= 12 else 5)
    figure = new_figure(max(2.4, PAGE * across / 5), 0.9 + 1.25 * -(-number // across))
    panels = grid_of_panels(figure, number, across, "tasks learnt", sharex=True, sharey=True)
    moments = np.arange(len(matrix))
    for index, (axes, task) in enumerate(zip(panels, tasks, strict=False)):
        learnt, colour = max(index - old + 1, 0), QUALITATIVE[0]
        axes.plot(moments[: learnt + 1], matrix[: learnt + 1, index], "--", color=colour, linewidth=0.9)
        axes.plot(moments[learnt:], matrix[learnt:, index], color=colour)
        if index >= old:
            axes.plot(learnt, matrix[learnt, index], "o", color=colour, markersize=4.5, clip_on=False)
        axes.set_title(plain(f"{task} (old)" if index < old else f"{learnt} {task}", 24), fontsize=7, pad=3)
    if len(matrix) > 2:
        means = [float(matrix[moment, old : old + moment].mean()) for moment in moments[1:]]
        panels[-1].plot(moments[1:], means, color=INK, linewidth=2.0)
        panels[-1].set_title("mean of those learnt", fontsize=7, pad=3)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if name == "success":
            axes.set_ylim(-0.03, 1.03)
        plain_axes(axes, grid="y")
    figure.supylabel(name, fontsize=8)
    return _titled(figure, document, f"Each task's {name}: dots where it has just been learnt, dashed before")


@styled
def comparison_figures(
    rows: Sequence[Row], measure: str, labels: Sequence[str], documents: Sequence[Document]
) -> dict[str, Figure]:
    """Draw ``measures``, ``bytes`` and ``learning``, from runs with the labels and documents that
    :func:`~varshare_rl.reporting.continual_table.compare` made the rows of."""
    return {
        "measures": measures_figure(rows, measure),
        "bytes": bytes_figure(rows, measure),
        "learning": learning_figure(rows, measure, labels, documents),
    }


def measures_figure(rows: Sequence[Row], measure: str) -> Figure:
    """Draw a panel per measure: means over seeds with their intervals, and every run as a small dot."""
    shown = [
        name for name in COMPARED if name == "performance" or any(row[name]["mean"] is not None for row in rows)
    ]
    figure = new_figure(PAGE, 0.9 + 0.26 * len(rows))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        for index, row in enumerate(rows):
            _draw_estimate(axes, row[name], index, look(index))
        if name != "performance":
            axes.axvline(0.0, color=INK, linewidth=0.8)
        elif measure == "success":
            axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel(COMPARED[name])
        plain_axes(axes, grid="x")
    panels[0].set_yticks(range(len(rows)), [plain(row["label"], 30) for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(f"{measure.capitalize()}: means over seeds with 95 % bootstrap intervals, dots are runs")
    return figure


def bytes_figure(rows: Sequence[Row], measure: str) -> Figure:
    """Draw performance at the end against the bytes stored then, on a logarithmic axis."""
    figure = new_figure(0.72 * PAGE, 3.2 + 0.08 * len(rows))
    axes = figure.subplots()
    handles, labels = [], []
    for index, row in enumerate(rows):
        estimate, kept, seen = row["performance"], row["stored_bytes"]["mean"], look(index)
        if estimate["mean"] is None:
            continue
        if estimate["low"] is not None:
            axes.plot([kept] * 2, [estimate["low"], estimate["high"]], color=seen.colour)
        handles += axes.plot(kept, estimate["mean"], seen.marker, color=seen.colour, markersize=6)
        labels.append(row["label"])
    stored = [row["stored_bytes"]["mean"] for row in rows]
    log_axis(axes, min(stored) / 2, max(stored) * 2, "B")
    axes.set_xlabel("bytes stored at the end: shared, per task and memory")
    axes.set_ylabel(f"mean {measure} at the end")
    if measure == "success":
        axes.set_ylim(-0.03, 1.03)
    plain_axes(axes, grid="both")
    legend_below(figure, handles, labels)
    figure.suptitle(f"{measure.capitalize()} against what has to be kept")
    return figure


def learning_figure(
    rows: Sequence[Row], measure: str, labels: Sequence[str], documents: Sequence[Document]
) -> Figure:
    """Draw a panel per task while it is learnt: means over seeds with their 95 % bands."""
    tasks = documents[0]["tasks"][documents[0]["old_tasks"] :]
    across = min(len(tasks), 4)
    figure = new_figure(PAGE, 1.0 + 1.5 * -(-len(tasks) // across) + 0.08 * len(rows))
    panels = grid_of_panels(figure, len(tasks), across, "transitions of the task", sharey=measure == "success")
    handles = []
    for number, (axes, task) in enumerate(zip(panels, tasks, strict=True)):
        for index, row in enumerate(rows):
            curves = [
                document["curves"][number]
                for label, document in zip(labels, documents, strict=True)
                if label == row["label"]
            ]
            line = _draw_curves(axes, curves, look(index))
            if number == 0:
                handles.append(line)
        axes.set_title(plain(task, 24), fontsize=7, pad=3)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if measure == "success":
            axes.set_ylim(-0.03, 1.03)
        plain_axes(axes, grid="y")
    figure.supylabel(measure, fontsize=8)
    names = [f"{row['label']} ({row['trained_parameters']['mean']:,.0f})" for row in rows]
    legend_below(figure, handles, names, title="method (parameters trained for a later task)")
    figure.suptitle(f"{measure.capitalize()} while a task is learnt: means over seeds, with 95 % bands")
    return figure


def _draw_curves(axes: Axes, curves: Sequence[Mapping[str, Sequence[float]]], seen: Look) -> Line2D:
    """Draw the mean at all transitions met in any run, each run's value in between by straight lines."""
    at = np.unique(np.concatenate([np.asarray(curve["transitions"], dtype=np.float64) for curve in curves]))
    values = np.stack([np.interp(at, curve["transitions"], _known(curve["success"])) for curve in curves])
    alone = len(curves[0]["transitions"]) == 1  # nothing was trained
    (line,) = axes.plot(at, values.mean(axis=0), marker=seen.marker if alone else None, **seen.line)
    if np.isfinite(values).all() and len(values) > 1:
        band = mean_band(values)
        assert band.low is not None
        assert band.high is not None
        axes.fill_between(at, band.low, band.high, color=seen.colour, alpha=0.15, linewidth=0)
    return line


def _known(values: Sequence[float | None]) -> Values:
    return np.asarray(values, dtype=np.float64)  # None becomes NaN


def _draw_estimate(axes: Axes, estimate: Mapping[str, Any], row: int, seen: Look) -> None:
    if estimate["mean"] is None:
        return
    runs = [value for value in estimate["runs"] if value is not None]
    if len(runs) > 1:
        apart = np.linspace(0.15, 0.35, len(runs))
        axes.plot(runs, row + apart, ".", color=seen.colour, markersize=3, alpha=0.7, clip_on=False)
    if estimate["low"] is not None:
        axes.plot([estimate["low"], estimate["high"]], [row] * 2, color=seen.colour, linewidth=1.8)
    axes.plot(estimate["mean"], row, seen.marker, color=seen.colour, markersize=5, clip_on=False)


def _moments(document: Document) -> list[str]:
    return ["(nothing)", *document["tasks"][document["old_tasks"] :]]


def _range(matrix: Values) -> tuple[float, float]:
    known = matrix[np.isfinite(matrix)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)


def _titled(figure: Figure, document: Document, title: str) -> Figure:
    figure.suptitle(f"{title}\n{document['method']} on {document['suite']}, seed {document['conditions']['seed']}")
    return figure
