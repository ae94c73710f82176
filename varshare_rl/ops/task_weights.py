"""Weights of many tasks compared, from their factors: inner products, variances, ranks.

A linear layer gives task ``i`` the mean weight ``W_i = theta + R_i``, ``[G, F]``. Everything here follows from a
few inner products; the residuals ``R: [T, G, F]`` of low rank are never built. Products are summed in float64:
tasks that hardly differ must not look different by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TaskWeights(Protocol):
    """The mean weights ``W_i = theta + R_i`` of ``T`` tasks, ``[G, F]`` each, and their posteriors."""

    @property
    def theta(self) -> Tensor | None:
        """``[G, F]``; None where tasks share nothing, and ``R_i`` is the whole weight."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(T, G, F)``."""

    def residual_gram(self) -> Tensor:
        """``<R_i, R_j>``, ``[T, T]`` float64."""

    def theta_products(self) -> Tensor:
        """``<theta, R_i>``, ``[T]`` float64; zeros without a ``theta``."""

    def mean_variance(self) -> Tensor | None:
        """Mean over entries of ``Var(W_i)``, ``[T]`` float64; None without a posterior."""

    def singular_values(self) -> Tensor:
        """Singular values of ``R_i`` that can differ from 0, ``[T, K]`` float64."""

    def posterior(self) -> dict[str, Tensor]:
        """Means and standard deviations of the Gaussian parameters by name (``mu``, ``sigma``, ``mu_A``, ...)."""


@dataclass(frozen=True)
class LowRankWeights:
    """``R_i = scale * B_i A_i``; sigmas of the factors, or None where they are not random.

    ``theta: [G, F]``; ``mus_a, sigmas_a: [T, r, F]``; ``mus_b, sigmas_b: [T, G, r]``.
    """

    theta: Tensor
    mus_a: Tensor
    mus_b: Tensor
    scale: float
    sigmas_a: Tensor | None = None
    sigmas_b: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(T, G, F)``."""
        return len(self.mus_a), self.theta.shape[0], self.theta.shape[1]

    def residual_gram(self) -> Tensor:
        """``<R_i, R_j> = scale^2 * sum over k, l of (A_i A_j^T)_kl (B_i^T B_j)_kl``: blocks of ``r x r``."""
        tasks, rank = self.mus_a.shape[:2]
        rows_a = self.mus_a.double().flatten(0, 1)  # [T r, F]
        rows_b = self.mus_b.double().transpose(1, 2).flatten(0, 1)  # [T r, G]
        blocks = (rows_a @ rows_a.t()) * (rows_b @ rows_b.t())
        return blocks.view(tasks, rank, tasks, rank).sum((1, 3)) * self.scale**2

    def theta_products(self) -> Tensor:
        """``<theta, R_i> = scale * sum over k of B_i[:, k]^T theta A_i[k, :]``."""
        through = self.mus_a.double() @ self.theta.double().t()  # [T, r, G]
        return (through * self.mus_b.double().transpose(1, 2)).sum((1, 2)) * self.scale

    def mean_variance(self) -> Tensor | None:
        """``Var((B A)_gf) = sum over k of sB^2 sA^2 + mB^2 sA^2 + sB^2 mA^2``, averaged over ``g`` and ``f``.

        Factors are independent, so the mean over ``g`` and ``f`` is a product of means for every ``k``.
        """
        if self.sigmas_a is None or self.sigmas_b is None:
            return None
        variance_a, variance_b = (sigmas.double().square() for sigmas in (self.sigmas_a, self.sigmas_b))
        mean_a, mean_b = variance_a.mean(2), variance_b.mean(1)  # [T, r]
        square_a, square_b = self.mus_a.double().square().mean(2), self.mus_b.double().square().mean(1)
        return (mean_b * mean_a + square_b * mean_a + mean_b * square_a).sum(1) * self.scale**2

    def singular_values(self) -> Tensor:
        """Singular values of the ``r x r`` product of triangular factors: ``B = Q_B U_B``, ``A^T = Q_A U_A``."""
        upper_a = torch.linalg.qr(self.mus_a.double().transpose(1, 2), mode="r").R
        upper_b = torch.linalg.qr(self.mus_b.double(), mode="r").R
        values: Tensor = torch.linalg.svdvals(upper_b @ upper_a.transpose(1, 2))
        return values * abs(self.scale)

    def posterior(self) -> dict[str, Tensor]:
        """``mu_A, mu_B`` and, where they are random, ``sigma_A, sigma_B``."""
        named = {"mu_A": self.mus_a, "sigma_A": self.sigmas_a, "mu_B": self.mus_b, "sigma_B": self.sigmas_b}
        return {name: values for name, values in named.items() if values is not None}


@dataclass(frozen=True)
class FullRankWeights:
    """``R_i`` entry by entry; ``theta: [G, F]`` or None, ``mus, sigmas: [T, G, F]``, sigmas None if not random."""

    theta: Tensor | None
    mus: Tensor
    sigmas: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(T, G, F)``."""
        return self.mus.shape[0], self.mus.shape[1], self.mus.shape[2]

    def residual_gram(self) -> Tensor:
        """``<R_i, R_j>``, ``[T, T]``."""
        rows = self.mus.double().flatten(1)
        return rows @ rows.t()

    def theta_products(self) -> Tensor:
        """``<theta, R_i>``, ``[T]``."""
        rows = self.mus.double().flatten(1)
        return rows.new_zeros(len(rows)) if self.theta is None else rows @ self.theta.double().flatten()

    def mean_variance(self) -> Tensor | None:
        """Mean of ``sigma^2`` over entries."""
        return None if self.sigmas is None else self.sigmas.double().square().mean((1, 2))

    def singular_values(self) -> Tensor:
        """Square roots of the eigenvalues of the smaller of ``R R^T`` and ``R^T R``, several times quicker than
        a decomposition of ``R``; values below ``1e-8`` of the largest are lost, which the effective rank ignores.
        """
        rows = self.mus.double()
        rows = rows if rows.shape[1] <= rows.shape[2] else rows.transpose(1, 2)
        squares: Tensor = torch.linalg.eigvalsh(rows @ rows.transpose(1, 2))
        return squares.clamp_min(0.0).sqrt()

    def posterior(self) -> dict[str, Tensor]:
        """``mu`` and, where it is random, ``sigma``."""
        return {"mu": self.mus} if self.sigmas is None else {"mu": self.mus, "sigma": self.sigmas}


def effective_rank(singular_values: Tensor) -> Tensor:
    """``exp(H(p))`` with ``p_k = s_k / sum(s)`` and Shannon's entropy ``H`` (Roy and Vetterli 2007).

    ``[..., K]`` to ``[...]``: between 1 and ``K``, ``K`` when all are equal; 0 for a zero matrix.
    """
    total = singular_values.sum(-1, keepdim=True)
    share = singular_values / total.clamp_min(torch.finfo(total.dtype).tiny)
    entropy = torch.special.entr(share).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), torch.zeros_like(entropy))


def disagreement(gram: Tensor) -> Tensor:
    """``mean over i of ||R_i - mean R||^2``, which is that of ``W``, from ``<R_i, R_j> [T, T]``."""
    return (gram.diagonal().mean() - gram.mean()).clamp_min(0.0)


def squared_distances(gram: Tensor) -> Tensor:
    """``||R_i - R_j||^2 = ||W_i - W_j||^2``, ``[T, T]``, from ``<R_i, R_j>``."""
    squares = gram.diagonal()
    return (squares.unsqueeze(0) + squares.unsqueeze(1) - 2.0 * gram).clamp_min(0.0).fill_diagonal_(0.0)


def cosines(gram: Tensor) -> Tensor:
    """Cosines ``[T, T]`` of what ``gram`` has the inner products of; NaN with a zero vector, itself included."""
    norms = gram.diagonal().clamp_min(0.0).sqrt()
    scaled: Tensor = gram / norms.outer(norms)
    return scaled.clamp(-1.0, 1.0)
