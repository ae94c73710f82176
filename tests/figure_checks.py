"""Checks of what a figure looks like."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from matplotlib.figure import Figure
from matplotlib.text import Text


def assert_nothing_overlaps(figure: Figure, least_size: float = 5.9) -> None:
    """Fail where upright texts lie on each other, leave the figure, or are too small to read."""
    figure.canvas.draw()
    paper, boxes = figure.bbox, []
    for text in seen_texts(figure):
        assert text.get_fontsize() >= least_size, text
        box = text.get_window_extent()
        for low, high, within in ((box.x0, box.x1, paper.x1), (box.y0, box.y1, paper.y1)):
            assert low >= -1, f"{text} leaves the figure"
            assert high <= within + 1, f"{text} leaves the figure"
        if not text.get_rotation() % 90:
            boxes.append((text, box))
    for (one, first), (other, second) in combinations(boxes, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert across <= 1 or down <= 1, f"{one} lies on {other}"


def seen_texts(figure: Figure) -> list[Text]:
    """Return the texts that are drawn: those of axes that are seen, and of ticks within their ends."""
    found: list[Any] = [*figure.texts]
    for legend in figure.legends:
        found += legend.get_texts()
    for axes in figure.axes:
        if axes.get_visible():
            found += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
            for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                low, high = min(low, high), max(low, high)
                found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    found += [figure._suptitle] if figure.get_suptitle() else []  # type: ignore[attr-defined]
    return [text for text in dict.fromkeys(found) if text.get_visible() and text.get_text().strip()]
