from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from varshare_rl.reporting.previews import _short, heat_map
from varshare_rl.reporting.style import DIVERGING, MISSING, SEQUENTIAL, paint, rgb


def test_paint_hits_the_anchors() -> None:
    colours = paint(np.array([-1.0, 0.0, 1.0, 5.0, np.nan]), -1.0, 1.0, DIVERGING)
    assert [tuple(int(c) for c in colour) for colour in colours] == [
        rgb(DIVERGING[0]), rgb(DIVERGING[5]), rgb(DIVERGING[-1]), rgb(DIVERGING[-1]), rgb(MISSING),
    ]  # fmt: skip


def test_a_heat_map_has_a_cell_of_its_colour_for_every_value() -> None:
    values = np.array([[0.0, 1.0, np.nan], [0.5, 0.25, 0.75]])
    image = heat_map(values, ["up", "down"], ["a", "b", "a long name"], "title", 0.0, 1.0)
    assert image.dtype == np.uint8
    found = {tuple(int(c) for c in colour) for colour in image.reshape(-1, 3)}
    assert {tuple(int(c) for c in colour) for colour in paint(values, 0.0, 1.0, SEQUENTIAL).reshape(-1, 3)} <= found


def test_room_for_many_tasks_and_for_one() -> None:
    many = [f"a-task-with-a-long-name-{index}" for index in range(50)]
    image = heat_map(np.zeros((50, 50)), many, many, "distance", 0.0, 0.0)
    assert image.shape[0] > 50 * 15
    assert image.shape[1] > 50 * 15
    assert heat_map([[1.0]], ["only"], ["only"], "a title that is wider than the map", -1.0, 1.0).shape[1] > 150


@pytest.mark.parametrize("scale", [1.0, 0.9, 0.85, 0.8, 0.7, 0.6, 0.55])
def test_a_minus_sign_is_seen(scale: float) -> None:
    """In the first nine columns of its cell, also where TensorBoard makes the picture smaller."""
    seen = []
    for value in (-0.5, 0.5):
        picture = Image.fromarray(heat_map([[value]], ["a"], ["b"], "", -9.0, 9.0, ("#ffffff", "#ffffff")))
        cell = picture.crop((picture.width - 50, picture.height - 92, picture.width - 6, picture.height - 48))
        smaller = cell.resize((round(44 * scale), round(44 * scale)), Image.Resampling.NEAREST)
        seen.append(bool((np.array(smaller)[:, : round(9 * scale)] < 140).any()))
    assert seen == [True, False]


def test_short_numbers() -> None:
    numbers = (0.0, -0.001, 0.534, -1.0, 0.5, 12.4, 100.0, 3421.0, 123_456.0)
    assert [_short(number) for number in numbers] == ["0", "0", "0.53", "-1", "0.5", "12", "100", "3.4k", "123k"]
