"""Statistics are those of rliable, and intervals say how far they can be trusted."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from rliable import library, metrics

from varshare_rl.errors import UserError
from varshare_rl.reporting.statistics import (
    Interval,
    aggregates,
    iqm,
    iqm_band,
    iqm_interval,
    mean_band,
    mean_interval,
    performance_profile,
    probability_of_improvement,
    task_means,
)

SCORES = np.random.default_rng(3).random((5, 12))
OTHERS = np.round(np.random.default_rng(4).random((3, 12)), 1)


def test_iqm_of_eight_values_is_the_mean_of_the_middle_four() -> None:
    scores = np.array([[0.9, 0.0, 0.2, 0.3], [0.4, 0.5, 1.0, 0.1]])
    assert iqm(scores) == pytest.approx((0.2 + 0.3 + 0.4 + 0.5) / 4)
    assert iqm(scores[:, :3]) == pytest.approx((0.2 + 0.4 + 0.5 + 0.9) / 4)  # of six, one at either end


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3), (3, 10), (5, 50)])
def test_points_are_those_of_rliable(shape: tuple[int, int]) -> None:
    scores = np.random.default_rng(shape[1]).random(shape)
    assert iqm(scores) == pytest.approx(metrics.aggregate_iqm(scores), abs=1e-12)
    found = aggregates(scores)
    assert found["mean"].point == pytest.approx(metrics.aggregate_mean(scores))
    assert found["median"].point == pytest.approx(metrics.aggregate_median(scores))


@pytest.mark.parametrize(("name", "reference"), [
    ("iqm", metrics.aggregate_iqm), ("mean", metrics.aggregate_mean), ("median", metrics.aggregate_median),
])  # fmt: skip
def test_intervals_are_those_of_rliable(name: str, reference: object) -> None:
    np.random.seed(0)  # noqa: NPY002
    points, ends = library.get_interval_estimates(
        {"x": SCORES}, lambda drawn: np.array([reference(drawn)]), reps=2000  # type: ignore[operator]
    )  # fmt: skip
    found = aggregates(SCORES)[name]
    assert (found.point, found.low, found.high) == pytest.approx((points["x"][0], *ends["x"][:, 0]), abs=1e-12)


def test_profiles_and_improvement_are_those_of_rliable() -> None:
    thresholds = np.linspace(0, 1, 21)
    np.random.seed(0)  # noqa: NPY002
    points, ends = library.create_performance_profile({"x": SCORES}, thresholds, reps=2000)
    band = performance_profile(SCORES, thresholds)
    np.testing.assert_allclose(np.stack([band.points, band.low, band.high]), [points["x"], *ends["x"]], atol=1e-12)
    assert probability_of_improvement(SCORES, OTHERS).point == pytest.approx(
        metrics.probability_of_improvement(SCORES, OTHERS)
    )
    assert probability_of_improvement(OTHERS, OTHERS).point == 0.5
    assert probability_of_improvement(SCORES + 1.0, OTHERS) == (1.0, 1.0, 1.0, 3)


def test_bands_are_the_intervals_of_every_moment() -> None:
    curves = np.stack([SCORES, SCORES**2], axis=2)
    band = iqm_band(curves)
    assert band.low is not None
    assert band.high is not None
    first = iqm_interval(SCORES)
    assert (band.points[0], band.points[1]) == pytest.approx((float(iqm(SCORES)), float(iqm(SCORES**2))))
    # another draw than for the scores alone: equal but for the noise of the bootstrap
    assert (band.low[0], band.high[0]) == pytest.approx((first.low, first.high), abs=0.02)
    means = mean_band(SCORES)
    np.testing.assert_allclose(means.points, SCORES.mean(0))
    assert [row.point for row in task_means(SCORES)] == pytest.approx(SCORES.mean(0).tolist())


def test_worst_tasks_are_the_least_means_and_need_more_tasks_than_k() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.4], [0.3, 0.9, 0.1, 0.4]])  # means 0.2, 0.9, 0.3, 0.4
    found = aggregates(scores)
    assert found["worst_1"].point == pytest.approx(0.2)
    assert found["worst_3"].point == pytest.approx(0.3)
    assert "worst_10" not in found
    assert "worst_10" in aggregates(SCORES)


def test_the_mean_of_one_number_per_run_has_the_interval_of_rliable_up_to_noise() -> None:
    values = np.random.default_rng(1).random(10)
    alone, in_table = mean_interval(values.tolist()), aggregates(values[:, None])["mean"]
    assert alone.point == pytest.approx(in_table.point)
    assert (alone.low, alone.high) == pytest.approx((in_table.low, in_table.high), abs=0.01)
    assert np.isnan(mean_interval([]).point)


def test_the_interval_of_two_numbers_and_of_many() -> None:
    """Means of two draws are 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4: the quantiles are the ends."""
    assert mean_interval([0.0, 1.0]) == (0.5, 0.0, 1.0, 2)
    assert mean_interval([0.3, 0.3]) == (0.3, 0.3, 0.3, 2)
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    error = values.std() / np.sqrt(len(values))
    found = mean_interval(values.tolist())
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error
    )


def test_intervals_say_where_they_cannot_be_trusted() -> None:
    assert Interval(0.8, 0.71, 0.9, 4).text(2) == "0.80 (0.71 to 0.90)"
    few, one = iqm_interval(SCORES[:3]), iqm_interval(SCORES[:1])
    assert few.text().endswith("; 3 runs, too narrow)")
    assert (one.low, one.high) == (None, None)
    assert one.text().endswith(" (one run, no interval)")
    assert mean_interval([0.5]) == (0.5, None, None, 1)


def test_the_same_scores_have_the_same_interval_and_other_draws_go_on_as_they_were() -> None:
    np.random.seed(7)  # noqa: NPY002
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    first = iqm_interval(SCORES)
    np.testing.assert_array_equal(np.random.random(3), expected)  # noqa: NPY002
    assert iqm_interval(SCORES) == first


def test_without_rliable_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rliable", None)
    with pytest.raises(UserError, match="need rliable, of the extra report;"):
        iqm_interval(SCORES)
    assert mean_interval([0.0, 1.0])[:3] == (0.5, 0.0, 1.0)


@pytest.mark.parametrize("scores", [np.zeros((0, 3)), np.zeros((3, 0)), np.array([[0.1, np.nan]])])
def test_missing_scores_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite"):
        task_means(scores)
