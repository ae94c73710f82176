"""Figures of sharing, drawn from the document that a run and a report write (see docs/sharing.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram

from varshare_rl.reporting.figures import ANNOTATED, Matrix, draw_heat_map, new_figure, plain_axes, styled
from varshare_rl.reporting.style import INK, QUALITATIVE, short_names

Document = Mapping[str, Any]


@styled
def sharing_figures(document: Document) -> dict[str, Figure]:
    """Draw all figures that the document has numbers for, by file name without its ending.

    ``nats`` (layer by task), ``similarity`` and ``distance`` (task by task), ``layers`` (residual, sigma,
    effective rank and sharing of every layer), ``posteriors`` (histograms) and ``conflict`` (task by task, per
    network).
    """
    figures: dict[str, Figure] = {}
    if document["nats"] is not None:
        figures["nats"] = nats_figure(document)
    if document["layers"]:
        figures["similarity"] = similarity_figure(document)
        figures["distance"] = distance_figure(document)
        figures["layers"] = layers_figure(document)
        figures["posteriors"] = posteriors_figure(document)
    if document["conflict"] is not None:
        figures["conflict"] = conflict_figure(document)
    return figures


def nats_figure(document: Document) -> Figure:
    """Draw the divergence from the prior: in total per task above, by layer and task below."""
    layers = [layer for layer in document["layers"] if layer["nats"] is not None]
    matrix = _matrix([layer["nats"] for layer in layers])
    tasks = document["tasks"]
    figure = new_figure(max(5.0, 2.6 + 0.55 * len(tasks)), 3.4 + 0.34 * len(layers))
    above, below = figure.subplots(2, 1, height_ratios=[1.2, 0.6 + 0.3 * len(layers)])
    bars = above.bar(range(len(tasks)), document["nats"], color=QUALITATIVE[0], width=0.7)
    if len(tasks) <= ANNOTATED:
        above.bar_label(bars, fmt="%.0f", fontsize=7)
    above.set_xlim(-0.5, len(tasks) - 0.5)
    above.set_xticks([])
    above.set_ylabel("all layers")
    plain_axes(above)
    draw_heat_map(
        below, matrix, short_names(layer["name"] for layer in layers), tasks, 0.0, float(matrix.max()), "nats"
    )
    return _titled(figure, document, "Divergence of each task's posterior from its prior (nats)")


def similarity_figure(document: Document) -> Figure:
    """Draw cosines of the tasks' residuals, in the order of the tree."""
    figure, axes = _square(document)
    _between_tasks(axes, document, document["similarity"], "cosine of residuals", -1.0, 1.0)
    return _titled(figure, document, "Direction of the tasks' residuals (noise where the distance is near 0)")


def distance_figure(document: Document) -> Figure:
    """Draw relative distances of the tasks' weights beside the tree that they make."""
    tasks, clusters = document["tasks"], document["clusters"]
    side = _side(len(tasks))
    figure = new_figure(side + 3.4, side)
    tree, axes = figure.subplots(1, 2, width_ratios=[1.0, 3.0])
    matrix = _matrix(document["distance"])
    _between_tasks(axes, document, document["distance"], "distance of weights", 0.0, float(matrix.max()))
    in_sight = False
    if clusters["linkage"]:
        drawn = dendrogram(clusters["linkage"], no_plot=True)  # leaves at 5, 15, ...
        for positions, heights in zip(drawn["icoord"], drawn["dcoord"], strict=True):
            tree.plot(heights, positions, color=INK, linewidth=1.5)
        farthest = clusters["linkage"][-1][2] or clusters["threshold"]
        in_sight = clusters["threshold"] <= 1.5 * farthest
        if in_sight:
            tree.axvline(clusters["threshold"], color=QUALITATIVE[1], linestyle="--", linewidth=1.2)
        tree.set_xlim(max(farthest, clusters["threshold"] if in_sight else 0.0) * 1.08, 0.0)
        tree.set_ylim(10.0 * len(tasks), 0.0)  # the first leaf at the top, as in the heat map
    tree.set_yticks([])
    plain_axes(tree)
    tree.spines["left"].set_visible(False)
    tree.set_xlabel("merging distance")
    number = f"{clusters['count']} cluster{'s' * (clusters['count'] != 1)} at {clusters['threshold']:g}"
    number += " (dashed)" * in_sight
    return _titled(figure, document, f"Distance of the tasks' weights in the layer where it is largest: {number}")


def layers_figure(document: Document) -> Figure:
    """Draw measures of every layer's residuals: a dot per task, a bar for the mean, and the layer's sharing."""
    layers = document["layers"]
    names = short_names(layer["name"] for layer in layers)
    figure = new_figure(10.0, 2.2 + 0.62 * len(layers))
    panels = figure.subplots(2, 2, sharey=True)
    named = {
        "residual": r"residual against shared weight, $\|R_i\|\,/\,\|\theta\|$",
        "sigma": "posterior sigma against shared weight (rms)",
        "effective_rank": "effective rank of the residual",
    }
    for axes, (key, label) in zip(panels.flat, named.items(), strict=False):
        for row, layer in enumerate(layers):
            values = layer[key] if key in layer else layer["spread"]  # its name in documents of earlier versions
            if values is not None:
                _dots(axes, row, np.array(values, dtype=np.float64))
        axes.set_xlabel(label)
        axes.set_xlim(left=0.0)
    last = panels[1][1]
    shares = [layer["sharing"] for layer in layers]
    last.barh(range(len(layers)), shares, color=QUALITATIVE[2], height=0.6)
    for row, value in enumerate(shares):
        inside = value > 0.2
        last.text(
            value - 0.01 if inside else value + 0.01, row, f"{value:.3f}", va="center", fontsize=7,
            ha="right" if inside else "left", color="white" if inside else INK,
        )  # fmt: skip
    last.set_xlim(0.0, 1.0)
    last.set_xlabel(r"sharing, $\|\overline{W}\|^2\,/\,\overline{\|W_i\|^2}$ (1: all tasks the same)")
    for axes in panels.flat:
        plain_axes(axes, grid="x")
        axes.set_yticks(range(len(layers)), names)
        axes.set_ylim(len(layers) - 0.5, -0.5)
    return _titled(
        figure, document, f"Layers: dots are tasks; sharing of all layers together {document['sharing']:.3f}"
    )


def posteriors_figure(document: Document) -> Figure:
    """Draw histograms of the posterior's parameters, a row per layer, all tasks together."""
    layers = document["layers"]
    columns = list(dict.fromkeys(name for layer in layers for name in layer["histograms"]))
    figure = new_figure(1.2 + 2.3 * len(columns), 0.9 + 1.25 * len(layers))
    panels = figure.subplots(len(layers), len(columns), squeeze=False)
    for row, (layer, name) in enumerate(zip(layers, short_names(layer["name"] for layer in layers), strict=True)):
        for column, key in enumerate(columns):
            axes: Axes = panels[row][column]
            found = layer["histograms"].get(key)
            plain_axes(axes)
            axes.set_yticks([])
            if found is not None:
                edges = np.linspace(found["low"], found["high"], len(found["counts"]) + 1)
                colour = QUALITATIVE[1] if key.startswith("sigma") else QUALITATIVE[0]
                axes.stairs(found["counts"], edges, fill=True, color=colour)
                axes.locator_params(axis="x", nbins=4)
            if row == 0:
                axes.set_title(key)
            if column == 0:
                axes.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    return _titled(figure, document, "Parameters of the residuals, all tasks together (counts)")


def conflict_figure(document: Document) -> Figure:
    """Draw cosines of the tasks' gradients of the shared parameters, per network."""
    networks = document["conflict"]["networks"]
    side = _side(len(document["tasks"]))
    figure = new_figure((side + 1.2) * len(networks), side + 0.2)
    for axes, (name, found) in zip(
        figure.subplots(1, len(networks), squeeze=False)[0], networks.items(), strict=True
    ):
        _between_tasks(axes, document, found["cosine"], "cosine of gradients", -1.0, 1.0)
        if found["negative_share"] is not None:
            summary = f"{found['negative_share']:.0%} of pairs in conflict, mean {found['mean_cosine']:.2f}"
            axes.set_title(f"{name}: {summary}")
    title = "Gradients of the shared parameters in one minibatch"
    return _titled(figure, {"transitions": document["conflict"]["transitions"]}, title)


def _between_tasks(
    axes: Axes, document: Document, values: list[list[float | None]], label: str, low: float, high: float
) -> None:
    tasks = document["tasks"]
    order = document["clusters"]["order"] if document["clusters"] else list(range(len(tasks)))
    names = [tasks[task] for task in order]
    draw_heat_map(axes, _matrix(values)[np.ix_(order, order)], names, names, low, high, label, signed=low < 0)


def _dots(axes: Axes, row: int, values: npt.NDArray[np.float64]) -> None:
    apart = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else np.zeros(1)
    axes.plot(values, row + apart, ".", color=QUALITATIVE[0], markersize=5, alpha=0.8, clip_on=False)
    axes.plot([values.mean()] * 2, [row - 0.33, row + 0.33], color=QUALITATIVE[1], linewidth=2)


def _square(document: Document) -> tuple[Figure, Axes]:
    side = _side(len(document["tasks"]))
    figure = new_figure(side + 1.2, side)
    return figure, figure.subplots()


def _side(tasks: int) -> float:
    return 2.4 + max(0.42 * tasks if tasks <= 14 else 0.24 * tasks, 1.8)


def _matrix(values: Any) -> Matrix:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def _titled(figure: Figure, document: Document, title: str) -> Figure:
    figure.suptitle(f"{title}\nat {document['transitions']:,} transitions")
    return figure
