"""Gaussian posteriors over coefficients, and the prior that earlier tasks give for the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varshare_rl.transfer.share.factors import stack
from varshare_rl.transfer.share.layer_basis import Coefficients

#: Rounds of aligning all tasks to their mean; it hardly moves after the second.
ALIGNMENT_ROUNDS = 5


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussians over the coefficients of one layer, as a prior for a task.

    Attributes:
        mean_B, std_B: ``[k_B, p]``; mean_A, std_A: ``[k_A, p]``.
    """

    mean_B: Tensor
    std_B: Tensor
    mean_A: Tensor
    std_A: Tensor


def plain_prior(k_B: int, k_A: int, p: int, scale: float) -> Gaussian:
    """Return ``N(0, scale^2)`` for every coefficient: the prior of the first task."""
    parts = [part for k in (k_B, k_A) for part in (torch.zeros(k, p), torch.full((k, p), scale))]
    return Gaussian(*parts)


def prior_from_tasks(tasks: Sequence[Coefficients], p: int, scale: float, weight: float) -> Gaussian:
    """Return the prior for the next task: the Gaussian closest to the earlier tasks' posteriors.

    It minimises ``sum_i KL(q_i || prior) + weight * KL(N(0, scale^2) || prior)``, whose solution entry by entry is

        m   = sum_i mu_i / (t + weight)
        s^2 = [sum_i (sigma_i^2 + (mu_i - m)^2) + weight (scale^2 + m^2)] / (t + weight)

    so ``weight`` is a number of imagined tasks that had nothing but the plain prior: without earlier tasks they are
    all there is, and with ``weight = 0`` and one task the prior is that task's posterior. Coefficients that are
    points count with ``sigma = 0``. The tasks are aligned first, see :func:`align`.

    Args:
        tasks: coefficients of the earlier tasks in one layer, of any ranks up to ``p``.
        p: columns of the prior.
        scale: standard deviation of the plain prior.
        weight: see above; not negative.
    """
    aligned = align(tasks, p)
    parts = []
    for mus, variances in (aligned[:2], aligned[2:]):
        total = len(tasks) + weight
        mean = mus.sum(0) / total
        second = (variances + (mus - mean).square()).sum(0) + weight * (scale**2 + mean.square())
        parts += [mean.float(), (second / total).sqrt().float()]
    return Gaussian(*parts)


def align(tasks: Sequence[Coefficients], p: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn all coefficients to one gauge: ``mus_B [t, k_B, p]``, variances, ``mus_A [t, k_A, p]``, variances.

    ``(eps_B Q, eps_A Q)`` is the same correction for every orthogonal ``Q``, so means over tasks say something only
    after each task is turned to agree with the others. ``Q_i = U V^T`` of ``U S V^T = eps_B_i^T R_B + eps_A_i^T
    R_A`` brings a task closest to a reference ``R`` (orthogonal Procrustes, Schoenemann 1966); the reference is
    first the largest task, then the mean of all. A turned variance is that of the marginals, ``sigma^2 Q^2`` entry
    by entry.
    """
    mus = [_padded([getattr(own, part) for own in tasks], p) for part in ("eps_B", "eps_A")]
    stds = [
        _padded([torch.zeros_like(eps) if std is None else std for eps, std in pairs], p)
        for pairs in (
            [(own.eps_B, own.std_B) for own in tasks],
            [(own.eps_A, own.std_A) for own in tasks],
        )
    ]
    largest = int((mus[0].square().sum((1, 2)) + mus[1].square().sum((1, 2))).argmax())
    reference = [side[largest] for side in mus]
    turn = torch.eye(p, dtype=torch.float64).expand(len(tasks), p, p)
    for _ in range(ALIGNMENT_ROUNDS):
        u, _, vh = torch.linalg.svd(sum(side.mT @ to for side, to in zip(mus, reference, strict=True)))
        turn = u @ vh
        reference = [(side @ turn).mean(0) for side in mus]
    (mus_B, mus_A), (var_B, var_A) = (side @ turn for side in mus), (side.square() @ turn.square() for side in stds)
    return mus_B, var_B, mus_A, var_A


def _padded(columns: Sequence[Tensor], p: int) -> Tensor:
    stacked = stack(columns)
    return torch.nn.functional.pad(stacked, (0, p - stacked.shape[2]))
