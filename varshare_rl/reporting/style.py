"""Style of previews and figures: colours for those who do not see red or green too, and short names of layers."""

from __future__ import annotations

from collections.abc import Iterable

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
#: For a few things side by side (Okabe and Ito 2008).
QUALITATIVE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")


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
