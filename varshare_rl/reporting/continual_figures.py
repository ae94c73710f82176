"""Figures of continual learning: of a run, from its document, and of methods beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from varshare_rl.reporting.continual_measures import Document, Values, document_results
from varshare_rl.reporting.figures import INK, colour_map, draw_heat_map, new_figure, plain_axes
from varshare_rl.reporting.style import QUALITATIVE, SEQUENTIAL

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
    axes.set_ylabel("after learning", fontsize=8)
    return _titled(figure, document, f"Each task's {name} after each task of the sequence")


def tasks_figure(document: Document) -> Figure:
    """Draw a line per task over the sequence, dashed until it is learnt, and the mean of those learnt by then."""
    name, matrix = document_results(document)
    old, tasks = document["old_tasks"], document["tasks"]
    figure = new_figure(4.6 + 0.32 * len(matrix), max(3.6, 1.6 + 0.19 * (len(tasks) + 1)))
    axes = figure.subplots()
    moments = np.arange(len(matrix))
    for index, (task, colour) in enumerate(zip(tasks, _colours(len(tasks)), strict=True)):
        learnt = max(index - old + 1, 0)
        axes.plot(moments[: learnt + 1], matrix[: learnt + 1, index], "--", color=colour, linewidth=0.9, alpha=0.6)
        label = f"{task} (old)" if index < old else task
        axes.plot(moments[learnt:], matrix[learnt:, index], color=colour, linewidth=1.4, label=label)
        if index >= old:
            axes.plot(learnt, matrix[learnt, index], "o", color=colour, markersize=5)
    if len(matrix) > 2:
        means = [float(matrix[moment, old : old + moment].mean()) for moment in moments[1:]]
        axes.plot(moments[1:], means, color=INK, linewidth=2.6, label="mean of those learnt")
    axes.set_xticks(moments, _moments(document), rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlabel("after learning", fontsize=8)
    axes.set_ylabel(name, fontsize=8)
    if name == "success":
        axes.set_ylim(-0.03, 1.03)
    plain_axes(axes)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return _titled(figure, document, f"Each task's {name}: dots where it has just been learnt, dashed before")


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
    figure = new_figure(2.0 + 3.0 * len(shown), 1.5 + 0.38 * len(rows))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        for index, row in enumerate(rows):
            _draw_estimate(axes, row[name], index, QUALITATIVE[index % len(QUALITATIVE)])
        if name != "performance":
            axes.axvline(0.0, color=INK, linewidth=0.8)
        elif measure == "success":
            axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel(COMPARED[name], fontsize=8)
        plain_axes(axes, grid="x")
    panels[0].set_yticks(range(len(rows)), [row["label"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(
        f"{measure.capitalize()}: means over seeds with 95 % bootstrap intervals, dots are runs", fontsize=10
    )
    return figure


def bytes_figure(rows: Sequence[Row], measure: str) -> Figure:
    """Draw performance at the end against the bytes stored then, on a logarithmic axis."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for index, row in enumerate(rows):
        estimate, kept = row["performance"], row["stored_bytes"]["mean"]
        if estimate["mean"] is None:
            continue
        colour = QUALITATIVE[index % len(QUALITATIVE)]
        if estimate["low"] is not None:
            axes.plot([kept] * 2, [estimate["low"], estimate["high"]], color=colour, linewidth=1.6)
        marker = "osD^vP"[index // len(QUALITATIVE) % 6]
        axes.plot(kept, estimate["mean"], marker, color=colour, markersize=7, label=row["label"])
    stored = [row["stored_bytes"]["mean"] for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(min(stored) / 2, max(stored) * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("bytes stored at the end: shared, per task and memory", fontsize=8)
    axes.set_ylabel(f"mean {measure} at the end", fontsize=8)
    if measure == "success":
        axes.set_ylim(-0.03, 1.03)
    plain_axes(axes, grid="both")
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.suptitle(f"{measure.capitalize()} against what has to be kept", fontsize=10)
    return figure


def learning_figure(
    rows: Sequence[Row], measure: str, labels: Sequence[str], documents: Sequence[Document]
) -> Figure:
    """Draw a panel per task while it is learnt: means over seeds, and thin lines of runs."""
    tasks = documents[0]["tasks"][documents[0]["old_tasks"] :]
    across = min(len(tasks), 4)
    down = -(-len(tasks) // across)
    figure = new_figure(3.4 + 3.0 * across, 1.4 + 2.3 * down)
    panels = figure.subplots(down, across, sharey=measure == "success", squeeze=False).flatten()
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    for number, (axes, task) in enumerate(zip(panels, tasks, strict=False)):
        for index, row in enumerate(rows):
            curves = [
                document["curves"][number]
                for label, document in zip(labels, documents, strict=True)
                if label == row["label"]
            ]
            colour = QUALITATIVE[index % len(QUALITATIVE)]
            style = ("-", "--", ":")[index // len(QUALITATIVE) % 3]
            for curve in curves if len(curves) > 1 else ():
                axes.plot(curve["transitions"], curve["success"], style, color=colour, linewidth=0.6, alpha=0.35)
            trained = row["trained_parameters"]["mean"]
            legend = {"label": f"{row['label']} ({trained:,.0f})"} if number == 0 else {}
            alone = len(curves[0]["transitions"]) == 1  # nothing was trained
            axes.plot(*_mean_curve(curves), "o" if alone else style, color=colour, linewidth=1.8, **legend)
        axes.set_title(task, fontsize=8)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if measure == "success":
            axes.set_ylim(-0.03, 1.03)
        plain_axes(axes)
    panels[0].set_ylabel(measure, fontsize=8)
    figure.supxlabel("transitions of the task", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False, title="parameters trained for a later task")
    figure.suptitle(f"{measure.capitalize()} while a task is learnt: means over seeds", fontsize=10)
    return figure


def _mean_curve(curves: Sequence[Mapping[str, Sequence[float]]]) -> tuple[Values, Values]:
    """Return the mean at all transitions met in any run, each run's value in between by straight lines."""
    at = np.unique(np.concatenate([np.asarray(curve["transitions"], dtype=np.float64) for curve in curves]))
    values = [np.interp(at, curve["transitions"], curve["success"]) for curve in curves]
    return at, np.mean(values, axis=0)


def _draw_estimate(axes: Axes, estimate: Mapping[str, Any], row: int, colour: str) -> None:
    if estimate["mean"] is None:
        return
    runs = [value for value in estimate["runs"] if value is not None]
    if len(runs) > 1:
        apart = np.linspace(0.1, 0.3, len(runs))
        axes.plot(runs, row + apart, ".", color=colour, markersize=4, alpha=0.7, clip_on=False)
    if estimate["low"] is not None:
        axes.plot([estimate["low"], estimate["high"]], [row] * 2, color=colour, linewidth=2.0)
    axes.plot(estimate["mean"], row, "o", color=colour, markersize=6, clip_on=False)


def _moments(document: Document) -> list[str]:
    return ["(nothing)", *document["tasks"][document["old_tasks"] :]]


def _colours(number: int) -> Sequence[Any]:
    if number <= len(QUALITATIVE):
        return QUALITATIVE[:number]
    ramp = colour_map(SEQUENTIAL)
    return [ramp(height) for height in np.linspace(0.0, 0.92, number)]  # the light end is hard to see on white


def _range(matrix: Values) -> tuple[float, float]:
    known = matrix[np.isfinite(matrix)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)


def _titled(figure: Figure, document: Document, title: str) -> Figure:
    figure.suptitle(
        f"{title}\n{document['method']} on {document['suite']}, seed {document['conditions']['seed']}", fontsize=10
    )
    return figure
