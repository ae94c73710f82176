"""Values as categorical distributions over fixed, evenly spaced atoms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def two_hot(x: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Each number as weights on the two atoms around it, so that their mean is the number.

    With atoms ``z_k = low + k d``, ``d = (high - low) / (bins - 1)``, and ``z_k <= x <= z_{k+1}``, the weights are
    ``(z_{k+1} - x) / d`` and ``(x - z_k) / d``; numbers outside ``[low, high]`` count as the nearest end
    (Bellemare et al. 2017, equation 7; Schrittwieser et al. 2020, appendix F). ``[...]`` to ``[..., bins]``.
    """
    position = (x.clamp(low, high) - low) * ((bins - 1) / (high - low))
    below = position.floor().clamp(0, bins - 2)
    weight = (position - below).unsqueeze(-1)
    index = below.long().unsqueeze(-1)
    weights = x.new_zeros(*x.shape, bins)
    return weights.scatter_(-1, index, 1.0 - weight).scatter_(-1, index + 1, weight)


def categorical_value(logits: Tensor, atoms: Tensor) -> Tensor:
    """Mean of the distribution, ``sum_k softmax(logits)_k z_k``; ``[..., bins]`` to ``[...]``."""
    return (logits.softmax(-1) * atoms).sum(-1)


def categorical_cross_entropy(logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
    """Mean cross-entropy of the two-hot targets and the distributions, per task.

    ``-sum_k two_hot(target)_k log softmax(logits)_k``; ``logits [T, B, bins]`` and ``target [T, B]`` to ``[T]``.
    """
    weights = two_hot(target, low, high, logits.shape[-1])
    return -(weights * F.log_softmax(logits, dim=-1)).sum(-1).mean(-1)


def support(low: float, high: float, bins: int) -> Tensor:
    """The atoms, ``[bins]``."""
    return torch.linspace(low, high, bins, dtype=torch.float64).float()
