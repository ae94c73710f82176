"""How far the residuals of stochastic layers scatter, in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from varshare_rl.nn.variational import VariationalLayer


@torch.no_grad()
def residual_spread(layer: VariationalLayer) -> Tensor:
    """Root mean square over entries of the standard deviation of each task's residual, ``[T]``."""
    variance = layer.task_weights().mean_variance()
    assert variance is not None
    return variance.sqrt().to(layer.theta.dtype)


def prior_spread(layer: VariationalLayer) -> Tensor:
    """The same for residuals drawn from the prior, ``[T]``: ``p``, or ``s sqrt(r) p^2`` for a product."""
    if len(layer.factors) == 1:
        return layer.prior_scale
    rank = layer.posteriors()[0][0].shape[1]
    return layer.prior_scale.square() * (layer.scale * math.sqrt(rank))


@torch.no_grad()
def noise_to_weight(modules: Iterable[nn.Module]) -> tuple[float, float]:
    """Spread of the residuals over the root mean square of ``theta``: now, and at the prior.

    Means over all variational layers and tasks. Raises ValueError if there is none.
    """
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, VariationalLayer)]
    if not layers:
        raise ValueError("no layer has a posterior")
    size = [layer.theta.square().mean().sqrt() for layer in layers]
    now = torch.stack([residual_spread(layer).mean() / rms for layer, rms in zip(layers, size, strict=True)])
    prior = torch.stack([prior_spread(layer).mean() / rms for layer, rms in zip(layers, size, strict=True)])
    return float(now.mean()), float(prior.mean())
