"""Batches of low-rank products ``B_i A_i``, without ever building one.

Everything here is float64 and stacked over tasks: ``left [N, G, R]`` and ``right [N, F, R]`` stand for the matrices
``left_i right_i^T [G, F]``. Lower ranks are filled up with columns of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Relative error of rounding a product's two factors to float32.
FACTOR_ROUNDING = 1.01 * 2.0**-23
#: Singular values below this part of a matrix's largest are rounding of float32 and not its own.
NUMERICAL_ZERO = 1e-7


def stack(factors: Sequence[Tensor]) -> Tensor:
    """Stack ``[x, r_i]`` of different ``r_i`` as one ``[N, x, max r]`` in float64, filled up with zeros."""
    widest = max(factor.shape[1] for factor in factors)
    stacked = torch.zeros(len(factors), factors[0].shape[0], widest, dtype=torch.float64)
    for row, factor in zip(stacked, factors, strict=True):
        row[:, : factor.shape[1]] = factor
    return stacked


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return canonical factors of every product: ``left right^T = U S V^T`` gives ``U sqrt(S)``, ``V sqrt(S)``.

    All pairs ``(B G, G^-1 A)`` of one adapter have the same canonical form, up to what an SVD leaves open; of the
    two signs of a column the one is taken that makes its largest entry in ``U`` positive. The columns come by
    decreasing singular value, so the first ``p`` are the best approximation of rank ``p``.

    Returns:
        ``[N, G, R'], [N, F, R']`` and the singular values ``[N, R']`` with ``R' = min(G, F, R)``.
    """
    left_q, left_r = torch.linalg.qr(left)
    right_q, right_r = torch.linalg.qr(right)
    u, singular, vh = torch.linalg.svd(left_r @ right_r.mT, full_matrices=False)
    u, v = left_q @ u, right_q @ vh.mT
    largest = u.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(u.gather(1, largest) < 0, -1.0, 1.0)
    root = singular.sqrt().unsqueeze(1) * sign
    return u * root, v * root, singular


def inner(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> Tensor:
    """Return ``<L R^T, L' R'^T> = tr((L^T L') (R^T R')^T)`` of every pair of products, ``[N]``."""
    return ((left.mT @ other_left) * (right.mT @ other_right)).sum((1, 2))


def norm(left: Tensor, right: Tensor) -> Tensor:
    """Return the Frobenius norm of every product, ``[N]``."""
    return inner(left, right, left, right).clamp_min(0.0).sqrt()


def distance(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> Tensor:
    """Return the Frobenius norm of the difference of every pair of products, ``[N]``.

    From triangular factors: a difference of squares would lose half of the digits.
    """
    sides = (torch.cat([left, other_left], dim=2), torch.cat([right, -other_right], dim=2))
    left_r, right_r = (torch.linalg.qr(side, mode="r").R for side in sides)
    difference: Tensor = torch.linalg.matrix_norm(left_r @ right_r.mT)
    return difference


def relative(error: Tensor, size: Tensor) -> Tensor:
    """Return ``error / size``, and 0 where there is nothing to get wrong."""
    return torch.where(size > 0, error / size.clamp_min(torch.finfo(size.dtype).tiny), torch.zeros_like(error))


def left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors ``[G, K]`` and values ``[K]`` of ``[G, M]``, of numerical rank ``K >= 1``."""
    if matrix.shape[1] > matrix.shape[0]:
        matrix = compress(matrix)
    u, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
    # Far below NUMERICAL_ZERO: what is small beside the largest adapter may be all that another one has.
    rank = max(1, int((singular > 1e-10 * singular[0]).sum()))
    return u[:, :rank], singular[:rank]


def compress(matrix: Tensor) -> Tensor:
    """Return ``[G, M]`` as ``[G, min(G, M)]`` with the same left singular vectors and values (an LQ factor)."""
    triangle: Tensor = torch.linalg.qr(matrix.mT, mode="r").R
    return triangle.mT


def orthonormal(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return a float32 basis ``[G, k]`` as ``Q R`` in float64: ``Q`` orthonormal, ``R [k, k]`` near the identity.

    Rounding left its columns orthonormal to 1e-7 only. An error that is a small difference of squares would be
    wrong by the root of that, 3e-4.
    """
    q, r = torch.linalg.qr(basis.double())
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r)
    return q * sign, sign[:, None] * r
