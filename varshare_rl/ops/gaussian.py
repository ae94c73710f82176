"""Diagonal Gaussians, as the posteriors of the residual factors are, and random signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from varshare_rl.ranks import for_rows

#: The least standard deviation that a posterior is given.
LEAST_SIGMA = 1e-8

_POWERS_OF_TWO = 1 << torch.arange(32, dtype=torch.int64)


def softplus_sigma(rho: Tensor, temperature: float = 1.0) -> Tensor:
    """Standard deviation ``sigma = softplus(rho) * temperature`` (Blundell et al. 2015, section 3.2)."""
    sigma = F.softplus(rho)
    return sigma if temperature == 1.0 else sigma * temperature


def inverse_softplus(sigma: Tensor) -> Tensor:
    """``rho`` with ``softplus(rho) = sigma``, of at least :data:`LEAST_SIGMA`: softplus reaches 0 nowhere."""
    sigma = sigma.clamp_min(LEAST_SIGMA)
    return sigma + torch.log(-torch.expm1(-sigma))


def posterior_kl(posteriors: Sequence[tuple[Tensor, Tensor]], log_prior_scales: Sequence[Tensor]) -> Tensor:
    """Sum over each task's Gaussian matrices of ``KL(N(mu, sigma^2) || N(0, p^2))``, ``sigma = softplus(rho)``.

    Entry by entry ``log(p / sigma) + (sigma^2 + mu^2) / (2 p^2) - 1/2``, with ``p = exp(log_prior_scale)``. The
    gradients are written out, which takes a third of the passes: ``mu / p^2``, ``(sigma / p^2 - 1 / sigma)
    sigmoid(rho)``, and for the prior ``n - sum(sigma^2 + mu^2) / p^2`` with ``n`` entries. Differentiable once.

    Args:
        posteriors: ``mu`` and ``rho`` of every matrix, each ``[T, ...]``, at least one.
        log_prior_scales: of every matrix, ``[T]``.

    Returns:
        ``[T]`` nats. All matrices of a network at once cost less than one by one: most have few entries.
    """
    mus, rhos = zip(*posteriors, strict=True)
    kl: Tensor = _PosteriorKL.apply(torch.stack(tuple(log_prior_scales)), *mus, *rhos)  # type: ignore[no-untyped-call]
    return kl


class _PosteriorKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_scales: Tensor, *parameters: Tensor) -> Tensor:
        count = len(log_scales)
        mus, sigmas = parameters[:count], [F.softplus(rho) for rho in parameters[count:]]
        parts = [part.flatten(1) for part in (*mus, *sigmas)]
        norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts])
        squares = norms.square().view(2, count, -1).sum(0)
        logs = torch.stack([part.log().sum(1) for part in parts[count:]])
        entries = log_scales.new_tensor([[part.shape[1]] for part in parts[:count]])
        precisions = torch.exp(-2.0 * log_scales)
        ctx.save_for_backward(squares, entries, precisions, *parameters, *sigmas)
        kl: Tensor = (0.5 * squares * precisions + entries * (log_scales - 0.5) - logs).sum(0)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        squares, entries, precisions, *rest = ctx.saved_tensors
        count = len(entries)
        grad_scales = grad * (entries - squares * precisions) if ctx.needs_input_grad[0] else None
        grad_mus, grad_rhos = [], []
        for mu, rho, sigma, weighted in zip(
            rest[:count], rest[count : 2 * count], rest[2 * count :], grad * precisions, strict=True
        ):
            shape = (-1, *[1] * (mu.dim() - 1))
            precision = weighted.view(shape)
            grad_mus.append(mu * precision)
            slope = (sigma * precision).addcdiv_(grad.view(shape), sigma, value=-1.0)
            grad_rhos.append(slope.mul_(torch.sigmoid(rho)))
        return (grad_scales, *grad_mus, *grad_rhos)


def drawn_product(x: Tensor, mean: Tensor, variance: Tensor, noise: Tensor) -> Tensor:
    """``x W^T`` for a fresh ``W ~ N(mean, variance)`` at every row (Kingma, Salimans and Welling 2015).

    ``N(x mean^T, (x^2) variance^T)``: the rows of ``W`` are independent. ``x: [K, B, F]``, ``mean, variance:
    [K, G, F]``, standard normal ``noise: [K, B, G]``; returns ``[K, B, G]``.
    """
    sigma = product_sigma(x, variance)
    return torch.addcmul(torch.bmm(x, mean.transpose(1, 2)), sigma, noise)


def product_sigma(x: Tensor, variance: Tensor) -> Tensor:
    """Standard deviation ``sqrt((x^2) variance^T)`` of ``x W^T``, ``[K, B, G]``, as in :func:`drawn_product`."""
    return torch.bmm(x.square(), variance.transpose(1, 2)).clamp_min(1e-16).sqrt()


def drawn_low_rank(
    x: Tensor, means: Sequence[Tensor], variances: Sequence[Tensor], noise: Sequence[Tensor]
) -> Tensor:
    """``(x A^T) B^T`` for a fresh ``(A, B)`` at every row: exact in two stages, as rows are independent.

    ``means, variances``: of ``A [K, r, F]`` and of ``B [K, G, r]``; ``noise [K, B, r], [K, B, G]``.
    """
    z = drawn_product(x, means[0], variances[0], noise[0])
    return drawn_product(z, means[1], variances[1], noise[1])


def random_signs(like: Tensor) -> Tensor:
    """Independent -1 and 1 with even odds, in the shape of ``like [K, B, ...]``.

    32 of them are the bits of one random integer, a tenth of the time of as many Bernoulli draws.
    """
    return for_rows(_signs, like)


def _signs(like: Tensor) -> Tensor:
    count = like.numel()
    words = torch.randint(0, 1 << 32, (-(-count // 32), 1), dtype=torch.int64, device=like.device)
    bits = (words & _POWERS_OF_TWO.to(like.device)).ne(0).view(-1)[:count]
    return bits.view(like.shape).to(like.dtype).mul_(2.0).sub_(1.0)


def normal_log_prob(value: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log density of ``N(mean, exp(log_std)^2)`` element by element."""
    z = (value - mean) * torch.exp(-log_std)
    return -0.5 * (z.square() + math.log(2.0 * math.pi)) - log_std


def normal_entropy(log_std: Tensor) -> Tensor:
    """Entropy ``log_std + (1 + log(2 pi)) / 2`` of ``N(mean, exp(log_std)^2)`` in nats, element by element."""
    return log_std + 0.5 * (1.0 + math.log(2.0 * math.pi))


def prior_nats(mu: Tensor, sigma: Tensor, prior: Tensor) -> Tensor:
    """``KL(N(mu, sigma^2) || N(0, prior^2))`` element by element, exact also where it is next to nothing.

    :func:`posterior_kl` is quicker for sums; this is for what is to be told from 0. Shapes that broadcast.
    """
    # x - log(1 + x) of x = ratio^2 - 1 keeps its digits where the posterior is near the prior.
    excess = (sigma / prior).square() - 1.0
    of_sigma = (excess - torch.log1p(excess)).clamp_min(0.0)  # not below 0 by rounding
    return 0.5 * (of_sigma + (mu / prior).square())


def gaussian_kl_between(mu: Tensor, sigma: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> Tensor:
    """``KL(N(mu, sigma^2) || N(prior_mu, prior_sigma^2))`` element by element, in nats.

    ``log(p / sigma) + (sigma^2 + (mu - m)^2) / (2 p^2) - 1/2`` with ``m, p`` of the prior. Shapes that broadcast.
    """
    quadratic = (sigma.square() + (mu - prior_mu).square()) * 0.5 / prior_sigma.square()
    return quadratic + prior_sigma.log() - sigma.log() - 0.5
