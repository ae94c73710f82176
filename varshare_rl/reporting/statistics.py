"""Statistics over seeds and tasks, and how sure they are: the interquartile mean, and bootstrap intervals.

Scores are ``[S, T]``, a row per run and a column per task; learning curves are ``[S, T, K]`` at ``K`` moments. The
intervals hold what would come out with other seeds on the same tasks: 95 % percentile intervals by the stratified
bootstrap (the runs of every task are drawn apart, with replacement) of Agarwal et al. 2021, "Deep reinforcement
learning at the edge of the statistical precipice", as rliable, the extra ``report``, computes them. The same scores
have the same interval.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from varshare_rl.errors import missing_extra

Scores = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000
#: Of means of single numbers, which cost next to nothing.
MEAN_RESAMPLES = 9999
#: Intervals of so few runs are too narrow: a handful of values cannot be drawn in many ways.
FEW_RUNS = 3
#: Tasks that are the hardest for a method: how many are averaged.
WORST = (1, 3, 10)


class Interval(NamedTuple):
    """A statistic with its 95 % interval; ``low`` and ``high`` are None for fewer than two runs."""

    point: float
    low: float | None
    high: float | None
    runs: int

    @property
    def doubt(self) -> str:
        """What to say beside it where the interval is missing or too narrow; else nothing."""
        if self.low is None:
            return "one run, no interval"
        return f"{self.runs} runs, too narrow" if self.runs <= FEW_RUNS else ""

    def text(self, digits: int = 3) -> str:
        """Return ``0.800 (0.712 to 0.876)``, with its doubt if there is one."""
        ends = "" if self.low is None or self.high is None else f"{self.low:.{digits}f} to {self.high:.{digits}f}"
        inside = "; ".join(part for part in (ends, self.doubt) if part)
        return f"{self.point:.{digits}f}" + (f" ({inside})" if inside else "")


class Band(NamedTuple):
    """A statistic at ``K`` moments, each ``[K]``; without ``low`` and ``high`` for fewer than two runs."""

    points: Scores
    low: Scores | None
    high: Scores | None

    def row(self, index: int) -> Band:
        """Return one of several bands, where there is an axis before the moments."""
        ends = (None if end is None else end[index] for end in (self.low, self.high))
        return Band(self.points[index], *ends)


def iqm(scores: Scores) -> Scores:
    """Return the interquartile mean, the mean of the middle half of all runs' and tasks' values: ``[]`` or ``[K]``.

    Of ``n`` values the ``floor(n / 4)`` least and as many greatest are left out.
    """
    ordered = np.sort(scores.reshape(-1, *scores.shape[2:]), axis=0)
    cut = len(ordered) // 4
    return np.asarray(ordered[cut : len(ordered) - cut].mean(axis=0))


def iqm_interval(scores: Scores) -> Interval:
    """Return the interquartile mean of ``scores [S, T]`` with its interval.

    Raises:
        UserError: rliable is not installed.
        ValueError: there is no score, or one that is not finite.
    """
    return aggregates(scores)["iqm"]


def aggregates(scores: Scores) -> dict[str, Interval]:
    """Return ``iqm``, ``mean``, ``median`` and ``worst_<k>`` of ``scores [S, T]``, errors as :func:`iqm_interval`.

    ``median`` is that of the tasks' means over runs, ``worst_<k>`` the mean of the ``k`` least of them, for every
    ``k`` of ``WORST`` below the number of tasks.
    """
    worst = [k for k in WORST if k < scores.shape[1]]

    def of(drawn: Scores) -> Scores:
        tasks = np.sort(drawn.mean(axis=0))
        lowest = [tasks[:k].mean() for k in worst]
        return np.array([iqm(drawn), tasks.mean(), np.median(tasks), *lowest])

    band = _estimate((scores,), of)
    names = ("iqm", "mean", "median", *(f"worst_{k}" for k in worst))
    return {name: _at(band, index, len(scores)) for index, name in enumerate(names)}


def task_means(scores: Scores) -> list[Interval]:
    """Return the mean over runs of every task of ``scores [S, T]``. Needs no extra."""
    band = mean_band(scores)
    return [_at(band, task, len(scores)) for task in range(scores.shape[1])]


def iqm_band(curves: Scores) -> Band:
    """Return the interquartile mean of ``curves [S, T, K]`` at every moment; errors as :func:`iqm_interval`."""
    return _estimate((curves,), iqm)


def mean_band(values: Scores) -> Band:
    """Return the mean over runs of values ``[S, ...]``, each by the same bootstrap. Needs no extra.

    Raises:
        ValueError: there is no value, or one that is not finite.
    """
    _check(values)
    if len(values) < 2:
        return Band(values[0], None, None)
    from scipy.stats import bootstrap  # takes a while to import, and few need it

    ends = bootstrap(
        (values,), np.mean, axis=0, vectorized=True, confidence_level=LEVEL, n_resamples=MEAN_RESAMPLES,
        method="percentile", batch=1000, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Band(values.mean(axis=0), ends.low, ends.high)


def performance_profile(scores: Scores, thresholds: Scores) -> Band:
    """Return the share of runs and tasks of ``scores [S, T]`` above every threshold ``[K]``; errors as
    :func:`iqm_interval`."""

    def above(drawn: Scores) -> Scores:
        ordered = np.sort(drawn, axis=None)
        return 1.0 - np.searchsorted(ordered, thresholds, side="right") / ordered.size

    return _estimate((scores,), above)


def probability_of_improvement(scores: Scores, others: Scores) -> Interval:
    """Return how probable it is that a run of ``scores [S, T]`` beats one of ``others [R, T]`` on a task.

    The mean over tasks of ``P(X > Y) + P(X = Y) / 2``, the Mann-Whitney statistic; errors as :func:`iqm_interval`.
    """

    def better(one: Scores, other: Scores) -> Scores:
        above, level = one[:, None] > other, one[:, None] == other
        return np.array([above.mean() + level.mean() / 2])

    return _at(_estimate((scores, others), better), 0, min(len(scores), len(others)))


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of a number per run as :func:`mean_band`; NaN for none."""
    if not len(values):
        return Interval(np.nan, None, None, 0)
    return _at(mean_band(np.asarray(values, dtype=np.float64)[:, None]), 0, len(values))


def _at(band: Band, index: int, runs: int) -> Interval:
    if band.low is None or band.high is None:
        return Interval(float(band.points[index]), None, None, runs)
    return Interval(float(band.points[index]), float(band.low[index]), float(band.high[index]), runs)


def _estimate(samples: tuple[Scores, ...], statistic: Callable[..., Scores]) -> Band:
    """Return ``statistic`` of the samples, ``[K]``, with the ends of its interval."""
    for sample in samples:
        _check(sample)
    if min(len(sample) for sample in samples) < 2:
        return Band(statistic(*samples), None, None)
    given: Mapping[str, Any] = {"": samples[0] if len(samples) == 1 else list(samples)}
    with _fixed_draws():
        points, ends = _rliable().get_interval_estimates(
            given, statistic, reps=RESAMPLES, confidence_interval_size=LEVEL
        )
    return Band(np.asarray(points[""]), *ends[""])


def _check(scores: Scores) -> None:
    if scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(f"scores of the shape {list(scores.shape)} are none, or not all of them finite")


def _rliable() -> Any:
    try:
        from absl import logging
        from rliable import library
    except ImportError as error:
        raise missing_extra("statistics over seeds need rliable", "report") from error
    # Its logger closes the stream that it found, whoever else writes to it, when loggers are set up anew.
    logging.get_absl_handler().python_handler.setStream(sys.__stderr__)
    return library


@contextmanager
def _fixed_draws() -> Iterator[None]:
    """Seed numpy's global generator, which rliable draws from whatever it is given, and put it back."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
