"""One style of all figures: colours that all can tell apart, lines, sizes, and short names of layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

#: Little to much, lightness rising steadily (anchors of viridis).
SEQUENTIAL = (
    "#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26",
    "#fde725",
)  # fmt: skip
#: Negative blue, 0 nearly white, positive red (anchors of RdBu).
DIVERGING = (
    "#053061", "#2065ab", "#4393c3", "#90c4dd", "#d1e5f0", "#f7f6f6", "#fddbc7", "#f3a481", "#d6604d", "#b1182b",
    "#67001f",
)  # fmt: skip
#: No value.
MISSING = "#bbbbbb"
#: Ink of text, frames and means.
INK = "#222222"
#: Things side by side (Okabe and Ito 2008, without the yellow, which is hard to see on white).
QUALITATIVE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: Lengths of dashes and gaps in line widths; empty: solid.
DASHES: tuple[tuple[float, ...], ...] = (
    (), (5, 1.6), (1, 1.2), (6, 1.5, 1, 1.5), (10, 2), (3, 1.2, 1, 1.2, 1, 1.2), (2.2, 2.2), (8, 1.5, 2, 1.5),
)  # fmt: skip
MARKERS = "osD^vPX<>hp"
#: Widths of figures in inches: a column of a paper, and its page. Text has its printed size.
COLUMN, PAGE = 3.4, 7.0
#: Settings of matplotlib that every figure is drawn with.
SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans", "font.size": 8, "axes.titlesize": 8,
    "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "figure.titlesize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.linewidth": 0.7,
    "xtick.major.width": 0.7, "ytick.major.width": 0.7, "grid.color": "#dddddd", "grid.linewidth": 0.6,
    "lines.linewidth": 1.4, "lines.markersize": 4, "legend.frameon": False, "legend.handlelength": 3.2,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "pdf.fonttype": 42, "svg.hashsalt": "varshare_rl", "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}  # fmt: skip


class Look(NamedTuple):
    """How a thing is drawn wherever it is: colour, dashes and marker."""

    colour: str
    dashes: tuple[float, ...]
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of a line in matplotlib."""
        return {"color": self.colour, "linestyle": (0, self.dashes) if self.dashes else "-"}


def look(index: int) -> Look:
    """Return the look of the thing with this number; neighbours differ in all three, and 56 in colour or dashes."""
    return Look(QUALITATIVE[index % len(QUALITATIVE)], DASHES[index % len(DASHES)], MARKERS[index % len(MARKERS)])


def rgb(colour: str) -> tuple[int, int, int]:
    """Return ``#rrggbb`` as three bytes."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def paint(
    values: npt.NDArray[np.float64], low: float, high: float, anchors: tuple[str, ...]
) -> npt.NDArray[np.uint8]:
    """Return colours ``[..., 3]`` of ``values``, the ends of ``anchors`` at ``low`` and ``high``; NaN is grey."""
    scaled = (np.nan_to_num(values, nan=low) - low) / (high - low if high > low else 1.0)
    table = np.array([rgb(anchor) for anchor in anchors], dtype=np.float64)
    at = np.clip(scaled, 0.0, 1.0) * (len(table) - 1)
    channels = [np.interp(at, np.arange(len(table)), table[:, channel]) for channel in range(3)]
    colours = np.stack(channels, axis=-1).round().astype(np.uint8)
    colours[np.isnan(values)] = rgb(MISSING)
    return colours


def short_names(names: Iterable[str]) -> list[str]:
    """Return ``actor.network.layers.0`` as ``actor 0``, ``critic.networks.1.layers.2`` as ``critic 1 2``."""
    technical = ("network", "networks", "layers")
    return [" ".join(part for part in name.split(".") if part not in technical) for name in names]
