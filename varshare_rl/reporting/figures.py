"""Parts of all figures: paper, axes, legends, colours, heat maps, and the way to a file."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, cast

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from varshare_rl.reporting.style import DIVERGING, INK, MISSING, SEQUENTIAL, SETTINGS

#: Cells of a heat map hold their number up to this many to a side, unless told otherwise.
ANNOTATED = 14

Matrix = npt.NDArray[np.float64]
P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Have ``draw`` make figures of the one style, whatever matplotlib is set to."""

    @wraps(draw)
    def inside(*arguments: P.args, **options: P.kwargs) -> R:
        with rc_context(cast(Any, SETTINGS)):
            return draw(*arguments, **options)

    return inside


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure, sizes in inches, drawn without a screen."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


@styled
def to_file(figure: Figure, kind: Literal["png", "svg", "pdf"] = "png", dpi: int = 200) -> bytes:
    """Return the figure as the content of a file, the same for the same figure; a PDF has no title."""
    title, buffer = figure.get_suptitle(), io.BytesIO()
    date = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    if kind == "pdf":
        figure.suptitle("")
    figure.savefig(buffer, format=kind, dpi=dpi, metadata=date)
    if title:
        figure.suptitle(title)
    return buffer.getvalue()


def plain(name: str, width: int = 60) -> str:
    """Return a name as it is, not as mathematics, in lines of at most ``width`` characters."""
    lines = textwrap.wrap(name, width, break_long_words=True) or [""]
    shown = "\n".join(lines).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves such out of legends


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], title: str | None = None) -> None:
    """Put a legend below the axes, in as many columns as the labels leave room for."""
    shown = [plain(label) for label in labels]
    figure.legend(
        handles, shown, loc="outside lower center", ncols=_across(figure.get_figwidth(), shown), title=title
    )


def legend_height(width: float, labels: Sequence[str]) -> float:
    """Return how high :func:`legend_below` will be in a figure of this width, in inches."""
    shown = [plain(label) for label in labels]
    lines = max((label.count("\n") + 1 for label in shown), default=0)
    return 0.16 * lines * -(-len(shown) // _across(width, shown))


def _across(width: float, shown: Sequence[str]) -> int:
    longest = max((len(line) for label in shown for line in label.split("\n")), default=0)
    return max(1, min(len(shown), int(width * 17 / (longest + 9))))


def grid_of_panels(figure: Figure, number: int, across: int, label: str = "", **shared: Any) -> list[Axes]:
    """Make axes for ``number`` panels in rows of ``across``; those at the bottom of their column say ``label``."""
    down = -(-number // across)
    panels = figure.subplots(down, across, squeeze=False, **shared)
    for hidden in panels.flat[number:]:
        hidden.set_visible(False)
    used = list(panels.flat[:number])
    for axes in used[-across:]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(label)
    return used


def plain_axes(axes: Axes, grid: Literal["x", "y", "both"] | None = None) -> None:
    """Leave two sides of the frame; draw light lines along ``grid`` behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid is not None:
        axes.grid(True, axis=grid)


def log_axis(axes: Axes, low: float, high: float, unit: str = "") -> None:
    """Make the horizontal axis logarithmic, its numbers with the prefixes of units."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axes.xaxis.set_major_formatter(EngFormatter(unit=unit, sep=" " if unit else ""))
    axes.xaxis.set_minor_locator(NullLocator())


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
    axes.set_xticks(
        range(len(columns)), [plain(name) for name in columns], rotation=45, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(rows)), [plain(name) for name in rows])
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="minor", length=0)
    if max(matrix.shape) <= annotated:
        _annotate(axes, image, matrix)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label(label)
    return image


def _annotate(axes: Axes, image: Any, matrix: Matrix) -> None:
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            light = float(np.dot(image.to_rgba(value)[:3], (0.299, 0.587, 0.114)))
            text = f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"
            colour = "white" if light < 0.55 else INK
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
