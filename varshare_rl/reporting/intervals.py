"""How far a mean over few runs can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

LEVEL = 0.95
RESAMPLES = 9999


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean by the bootstrap (Efron 1979), the same for the same values.

    ``RESAMPLES`` times as many values are drawn with replacement; the ends are the 2.5 and 97.5 % quantiles of
    their means. None for fewer than two values. With few values it is too narrow.
    """
    if len(values) < 2:
        return None
    found = bootstrap(
        (np.asarray(values, dtype=np.float64),), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
