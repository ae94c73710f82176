"""Bootstrap intervals against what can be counted."""

from __future__ import annotations

import numpy as np
import pytest

from varshare_rl.reporting.intervals import bootstrap_interval


def test_one_run_has_no_interval() -> None:
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([0.5]) is None


def test_two_runs() -> None:
    """Means of two draws are 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4: the quantiles are the ends."""
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.3, 0.3]) == (0.3, 0.3)


def test_many_runs_as_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    error = values.std() / np.sqrt(len(values))
    found = bootstrap_interval(values.tolist())
    assert found is not None
    assert found == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.05 * error * 2
    )
    assert found == bootstrap_interval(values.tolist())
