"""Diagonal Gaussians: the posteriors of the residual factors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus_sigma(rho: Tensor, temperature: float = 1.0) -> Tensor:
    """Standard deviation ``sigma = softplus(rho) * temperature`` (Blundell et al. 2015, section 3.2)."""
    sigma = F.softplus(rho)
    return sigma if temperature == 1.0 else sigma * temperature


def gaussian_kl(mu: Tensor, sigma: Tensor, prior_scale: float) -> Tensor:
    """``KL(N(mu, sigma^2) || N(0, prior_scale^2))`` element by element, in nats.

    ``log(p / sigma) + (sigma^2 + mu^2) / (2 p^2) - 1/2`` with ``p = prior_scale``. Any equal shapes.
    """
    half_inverse_variance = 0.5 / prior_scale**2
    quadratic = (sigma.square() + mu.square()) * half_inverse_variance
    return quadratic - sigma.log() + (math.log(prior_scale) - 0.5)


def normal_log_prob(value: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log density of ``N(mean, exp(log_std)^2)`` element by element."""
    z = (value - mean) * torch.exp(-log_std)
    return -0.5 * (z.square() + math.log(2.0 * math.pi)) - log_std
