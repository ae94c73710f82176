"""Log-probabilities and entropies of the two policy families: tanh-squashed Gaussian and categorical.

Actions a task does not have (padding of a suite with unlike action spaces) carry ``mask`` False: they
contribute nothing to log-probabilities and are never chosen.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from varshare_rl.ops.gaussian import normal_log_prob


def tanh_log_det(raw: Tensor) -> Tensor:
    """``log(1 - tanh(raw)^2)`` element by element, stable for large ``|raw|``.

    Uses the identity ``2 (log 2 - raw - softplus(-2 raw))``.
    """
    return 2.0 * (math.log(2.0) - raw - F.softplus(-2.0 * raw))


def tanh_normal_log_prob(raw: Tensor, mean: Tensor, log_std: Tensor, mask: Tensor) -> Tensor:
    """Log density of the action ``tanh(raw)`` when ``raw ~ N(mean, exp(log_std)^2)``.

    Haarnoja et al. 2018, appendix C. ``raw, mean, log_std: [..., A]``, ``mask`` broadcasts; returns ``[...]``.
    """
    per_dimension = normal_log_prob(raw, mean, log_std) - tanh_log_det(raw)
    return (per_dimension * mask).sum(-1)


def masked_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Normalised log-probabilities ``[..., A]`` with choices outside ``mask`` at a very low, finite value."""
    return torch.log_softmax(logits.masked_fill(~mask, -1e8), dim=-1)


def categorical_log_prob(log_probs: Tensor, action: Tensor) -> Tensor:
    """Log-probability of ``action [...]`` (integers) under normalised ``log_probs [..., A]``."""
    return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def categorical_entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of normalised ``log_probs [..., A]``; returns ``[...]``."""
    return -(log_probs.exp() * log_probs).sum(-1)
