"""The interquartile mean over seeds and tasks, and how sure it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from varshare_rl.errors import UserError

Scores = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000


class Interval(NamedTuple):
    """A statistic with its 95 % interval; ``low`` and ``high`` are None for fewer than two runs."""

    point: float
    low: float | None
    high: float | None
    runs: int


def iqm(scores: Scores) -> Scores:
    """Return the mean of the middle half of ``scores [S, T]``, ``floor(n / 4)`` values left out at each end."""
    ordered = np.sort(scores, axis=None)
    cut = len(ordered) // 4
    return np.asarray(ordered[cut : len(ordered) - cut].mean())


def iqm_interval(scores: Scores) -> Interval:
    """Return the interquartile mean of ``scores [S, T]`` with its interval.

    Raises:
        UserError: rliable is not installed.
    """
    if len(scores) < 2:
        return Interval(float(iqm(scores)), None, None, len(scores))
    before = np.random.get_state()  # noqa: NPY002  (which rliable draws from)
    np.random.seed(0)  # noqa: NPY002
    try:
        points, ends = _rliable().get_interval_estimates(
            {"": scores}, lambda drawn: np.array([iqm(drawn)]), reps=RESAMPLES, confidence_interval_size=LEVEL
        )
    finally:
        np.random.set_state(before)  # noqa: NPY002
    return Interval(float(points[""][0]), float(ends[""][0][0]), float(ends[""][1][0]), len(scores))


def _rliable() -> Any:
    try:
        from rliable import library
    except ImportError as error:
        raise UserError(
            "statistics over seeds and tasks need rliable; pip install 'varshare_rl[report]'"
        ) from error
    return library
