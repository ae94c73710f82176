"""Parts of all figures: paper, axes, colours, heat maps, and the way to a PNG file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from varshare_rl.reporting.style import DIVERGING, MISSING, SEQUENTIAL

INK = "#222222"
#: Cells of a heat map hold their number up to this many to a side, unless told otherwise.
ANNOTATED = 14

Matrix = npt.NDArray[np.float64]


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure, sizes in inches, drawn without a screen."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure, dpi: int = 130) -> bytes:
    """Return the figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def plain_axes(axes: Axes, grid: Literal["x", "both"] | None = None) -> None:
    """Leave two sides of the frame; draw light lines along ``grid`` behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if grid is not None:
        axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)


def colour_map(anchors: tuple[str, ...]) -> Colormap:
    """Return a colour map through ``anchors``; what is not a number is grey."""
    return LinearSegmentedColormap.from_list("anchors", anchors).with_extremes(bad=MISSING)


def draw_heat_map(
    axes: Axes,
    matrix: Matrix,
    rows: Sequence[str],
    columns: Sequence[str],
    low: float,
    high: float,
    label: str,
    signed: bool = False,
    annotated: int = ANNOTATED,
) -> Any:
    """Draw ``matrix [R, C]`` with named rows and columns and a colour bar that says ``label``.

    Cells hold their number where neither side is longer than ``annotated``.
    """
    image = axes.imshow(
        np.ma.masked_invalid(matrix), cmap=colour_map(DIVERGING if signed else SEQUENTIAL), aspect="auto",
        norm=Normalize(low, high if high > low else low + 1.0),
    )  # fmt: skip
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labelsize=8)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="minor", length=0)
    if max(matrix.shape) <= annotated:
        _annotate(axes, image, matrix)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return image


def _annotate(axes: Axes, image: Any, matrix: Matrix) -> None:
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            light = float(np.dot(image.to_rgba(value)[:3], (0.299, 0.587, 0.114)))
            text = f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"
            colour = "white" if light < 0.55 else INK
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
