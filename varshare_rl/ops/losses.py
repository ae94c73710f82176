"""Losses, one number per task: every function reduces ``[T, B]`` to ``[T]``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """Clipped policy loss and its diagnostics, each ``[T]``."""

    loss: Tensor
    approximate_kl: Tensor
    clip_fraction: Tensor


def ppo_policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float) -> PolicyLoss:
    """Clipped surrogate of PPO (Schulman et al. 2017, equation 7), negated, per task.

    All inputs ``[T, B]``. ``approximate_kl`` is the estimator ``E[(ratio - 1) - log ratio]``, which is never
    negative.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean(-1)
    with torch.no_grad():
        approximate_kl = (ratio - 1.0 - log_ratio).mean(-1)
        clip_fraction = ((ratio - 1.0).abs() > clip).to(loss.dtype).mean(-1)
    return PolicyLoss(loss, approximate_kl, clip_fraction)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared error per task; ``[T, B]`` in, ``[T]`` out."""
    return 0.5 * (prediction - target).square().mean(-1)


def finite_mean(values: Tensor) -> Tensor:
    """Mean over the tasks whose value is finite; ``[T]`` in, a scalar out. Plain ``mean()`` where all are."""
    mean = values.mean()
    finite = torch.isfinite(values)
    others = torch.where(finite, values, 0.0).sum() / finite.sum().clamp_min(1)
    return torch.where(torch.isfinite(mean), mean, others)


def normalize_per_task(advantage: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Zero mean and unit variance within each task; ``[T, ...]`` in and out."""
    flat = advantage.flatten(1)
    normalized = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + epsilon)
    return normalized.view_as(advantage)
