"""Small heat maps for TensorBoard while a run trains.

Drawn pixel by pixel: a figure of matplotlib takes ten times as long, and training waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from varshare_rl.reporting.style import SEQUENTIAL, paint

INK, PAPER = "#222222", "#ffffff"
FONT_SIZE, GAP = 12, 6


def heat_map(
    values: npt.ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    low: float,
    high: float,
    anchors: tuple[str, ...] = SEQUENTIAL,
) -> npt.NDArray[np.uint8]:
    """Draw an image ``[height, width, 3]`` of ``values [R, C]`` with named rows and columns and a scale below.

    Cells hold their number where it fits. NaN is grey.
    """
    matrix = np.array(values, dtype=np.float64).reshape(len(rows), len(columns))
    font, numbers = _font(FONT_SIZE), _font(FONT_SIZE + 1)
    cell = 44 if max(matrix.shape) <= 12 else 15
    left = _longest(font, rows) + 2 * GAP
    top = FONT_SIZE + _longest(font, columns) + 4 * GAP
    width = max(left + cell * len(columns) + GAP, int(font.getlength(title)) + 2 * GAP)
    image = Image.new("RGB", (width, top + cell * len(rows) + 2 * FONT_SIZE + 4 * GAP), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, INK, font)
    colours = paint(matrix, low, high, anchors)
    for row, name in enumerate(rows):
        y = top + row * cell
        draw.text((left - GAP, y + cell / 2), name, INK, font, anchor="rm")
        for column in range(len(columns)):
            x, colour = left + column * cell, tuple(int(channel) for channel in colours[row, column])
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), colour)
            if cell > 2 * FONT_SIZE and not np.isnan(matrix[row, column]):
                ink = PAPER if np.dot(colour, (0.299, 0.587, 0.114)) < 140 else INK
                text = _printed(matrix[row, column])
                draw.text((x + cell / 2 - 1, y + cell / 2 - 1), text, ink, numbers, anchor="mm")
    for column, name in enumerate(columns):
        turned = _upright(name, font)
        image.paste(turned, (left + column * cell + (cell - turned.width) // 2, top - GAP - turned.height))
    _scale(image, font, left, low, high, anchors)
    return np.array(image)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's bold font, found without importing it.

    Pillow's own has no minus sign. TensorBoard leaves out lines where it makes a picture smaller; at 13 pixels a
    minus is two of them.
    """
    package = find_spec("matplotlib")
    assert package is not None
    assert package.origin is not None
    return ImageFont.truetype(
        Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans-Bold.ttf", size
    )


def _scale(
    image: Image.Image, font: ImageFont.FreeTypeFont, left: int, low: float, high: float, anchors: tuple[str, ...]
) -> None:
    """Draw the colour bar along the bottom, with its ends in numbers."""
    draw = ImageDraw.Draw(image)
    y = image.height - FONT_SIZE - 2 * GAP
    words = _printed(low), _printed(high)
    start, end = left, max(image.width - GAP - int(font.getlength(words[1])) - GAP, left + 20)
    draw.text((start - GAP, y + FONT_SIZE / 2), words[0], INK, font, anchor="rm")
    draw.text((end + GAP, y + FONT_SIZE / 2), words[1], INK, font, anchor="lm")
    bar = paint(np.linspace(low, high, end - start), low, high, anchors)
    image.paste(Image.fromarray(np.repeat(bar[None], FONT_SIZE, axis=0)), (start, y))


def _upright(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw ``text``, read from the bottom to the top."""
    image = Image.new("RGB", (int(font.getlength(text)) + 2, FONT_SIZE + 3), PAPER)
    ImageDraw.Draw(image).text((0, 0), text, INK, font)
    return image.transpose(Image.Transpose.ROTATE_90)


def _longest(font: ImageFont.FreeTypeFont, names: Sequence[str]) -> int:
    return max((int(font.getlength(name)) + 2 for name in names), default=0)


def _printed(value: float) -> str:
    return _short(value).replace("-", "\N{MINUS SIGN}")


def _short(value: float) -> str:
    """Write at most four characters where that is possible: 0.53, -1, 12, 3.4k."""
    if abs(value) >= 1000:
        return f"{value / 1000:.1f}k" if abs(value) < 100_000 else f"{value / 1000:.0f}k"
    text = f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text
