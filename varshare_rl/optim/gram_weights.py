"""PCGrad and FairGrad from the tasks' inner products, without a general solver: they are asked for at every step.

TorchJD has both; for ten tasks its FairGrad takes a third of the update that it is part of.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varshare_rl.fields import bounded
from varshare_rl.optim.aggregators import GramianAggregator
from varshare_rl.optim.gradient import AggregatorConfig
from varshare_rl.optim.jacobian import GradientAggregator
from varshare_rl.registry import register

Vector = NDArray[np.float64]
#: A task whose gradient's square is below this share of the largest one has no say.
_NEGLIGIBLE = 1e-14
#: Largest relative error of FairGrad's equation, and steps after which its best weights are taken as they are.
_ACCURACY, _STEPS = 1e-10, 200
#: Share of its objective that a Newton step may gain for it to be taken whole.
_NEAR = 1e-9


@register("gradient", "pcgrad")
@dataclass
class PCGradConfig(AggregatorConfig):
    """``gradient=pcgrad``: conflicting parts are projected away (Yu et al. 2020, Gradient Surgery)."""

    def build(self, num_tasks: int) -> GradientAggregator:
        """Make the aggregator."""
        return GramianAggregator(surgery_weights, of_sum=True)


@register("gradient", "fairgrad")
@dataclass
class FairGradConfig(AggregatorConfig):
    """``gradient=fairgrad``: fair resource allocation (Ban and Ji 2024)."""

    alpha: float = bounded(1.0, above=0)
    "Fairness: 1 is proportional, a large one max-min."

    def build(self, num_tasks: int) -> GradientAggregator:
        """Make the aggregator; its weights solve ``G w = w^(-1 / alpha)``."""
        return GramianAggregator(
            lambda gramian: fair_weights(gramian, self.alpha), degree=self.alpha / (1.0 + self.alpha)
        )


def surgery_weights(gramian: Tensor) -> Tensor:
    """Return PCGrad's weights of the gradients, ``[T]``, for their inner products ``[T, T]`` (Yu et al. 2020).

    Each task's gradient loses its part along every other one that it conflicts with by then, in random order
    (algorithm 1); weights are those of the sum of what is left. Orders are drawn as TorchJD draws them.
    """
    products = gramian.numpy()
    total = np.zeros(len(products))
    for task in range(len(products)):
        left = np.zeros(len(products))
        left[task] = 1.0
        for other in torch.randperm(len(products)).tolist():
            if other == task:
                continue
            along = products[other] @ left
            if along < 0.0:
                left[other] -= along / products[other, other]
        total += left
    return torch.from_numpy(total)


def fair_weights(gramian: Tensor, alpha: float) -> Tensor:
    """Return the weights ``w > 0`` with ``G w = w^(-1 / alpha)``, ``[T]`` (Ban and Ji 2024, equation 4).

    They are where ``w^T G w / 2 - sum_i w_i^(1 - 1 / alpha) / (1 - 1 / alpha)`` is least (a logarithm for ``alpha =
    1``), which is strictly convex, so damped Newton steps from the weights without conflict find them. A task
    without a gradient gets 0.
    """
    whole = gramian.numpy()
    heard = np.flatnonzero(whole.diagonal() > _NEGLIGIBLE * whole.diagonal().max())
    products = whole[np.ix_(heard, heard)]
    weights: Vector = products.diagonal() ** (-alpha / (1.0 + alpha))
    power = 1.0 - 1.0 / alpha

    def objective(at: Vector) -> float:
        gain = np.log(at).sum() if power == 0.0 else (at**power).sum() / power
        return float(0.5 * at @ products @ at - gain)

    worst = np.inf
    for _ in range(_STEPS):
        wanted = weights ** (-1.0 / alpha)
        error = products @ weights - wanted
        before, worst = worst, float((np.abs(error) / wanted).max())
        step = np.linalg.solve(products + np.diag(wanted / (alpha * weights)), error)
        length, slope = min(1.0, 0.9 / max(float((step / weights).max()), 1e-300)), float(error @ step)
        value = objective(weights)
        near = slope < _NEAR * abs(value)  # its digits cannot judge a step there
        if worst <= _ACCURACY or (near and worst >= before):
            break
        while not near and objective(weights - length * step) > value - 1e-4 * length * slope:
            length *= 0.5
        weights = weights - length * step
    found = np.zeros(len(whole))
    found[heard] = weights
    return torch.from_numpy(found)
