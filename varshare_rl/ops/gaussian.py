"""Diagonal Gaussians: the posteriors of the residual factors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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


def posterior_kl(mu: Tensor, rho: Tensor, prior_scale: float) -> Tensor:
    """Sum of :func:`gaussian_kl` over all but the first dimension, with ``sigma = softplus(rho)``.

    ``mu, rho: [T, ...]``; returns ``[T]`` nats. The gradients are written out, ``mu / p^2`` and
    ``(sigma / p^2 - 1 / sigma) sigmoid(rho)``, which takes a third of the passes. Differentiable once.
    """
    kl: Tensor = _PosteriorKL.apply(mu, rho, prior_scale)  # type: ignore[no-untyped-call]
    return kl


class _PosteriorKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, rho: Tensor, prior_scale: float) -> Tensor:
        sigma = F.softplus(rho)
        ctx.save_for_backward(mu, sigma)
        ctx.prior_scale = prior_scale
        flat_mu, flat_sigma = mu.flatten(1), sigma.flatten(1)
        squares = torch.linalg.vecdot(flat_mu, flat_mu) + torch.linalg.vecdot(flat_sigma, flat_sigma)
        constant = flat_mu.shape[1] * (math.log(prior_scale) - 0.5)
        kl: Tensor = squares * (0.5 / prior_scale**2) - flat_sigma.log().sum(1) + constant
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        mu, sigma = ctx.saved_tensors
        weight = grad.view(-1, *[1] * (mu.dim() - 1))
        precision = weight / ctx.prior_scale**2
        slope = torch.expm1(-sigma).neg_()  # sigmoid(rho)
        return mu * precision, (sigma * precision).sub_(weight / sigma).mul_(slope), None


def normal_log_prob(value: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log density of ``N(mean, exp(log_std)^2)`` element by element."""
    z = (value - mean) * torch.exp(-log_std)
    return -0.5 * (z.square() + math.log(2.0 * math.pi)) - log_std


def gaussian_kl_between(mu: Tensor, sigma: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> Tensor:
    """``KL(N(mu, sigma^2) || N(prior_mu, prior_sigma^2))`` element by element, in nats.

    ``log(p / sigma) + (sigma^2 + (mu - m)^2) / (2 p^2) - 1/2`` with ``m, p`` of the prior. Shapes that broadcast.
    """
    quadratic = (sigma.square() + (mu - prior_mu).square()) * 0.5 / prior_sigma.square()
    return quadratic + prior_sigma.log() - sigma.log() - 0.5
