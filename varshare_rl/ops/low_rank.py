"""Products ``b a`` of two thin matrices, and what can be worked out without ever building them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The correction ``scale * b a`` of one linear layer's weight (Hu et al. 2021, *LoRA*).

    Attributes:
        a: ``[r, in]``; b: ``[out, r]``; scale: ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA.

    Raises:
        ValueError: the shapes do not fit each other.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1] or self.rank == 0:
            raise ValueError(
                f"factors a {tuple(self.a.shape)} and b {tuple(self.b.shape)} do not fit; give [r, in] and [out, r]"
            )

    @property
    def rank(self) -> int:
        """Number of rows of ``a``, ``r``."""
        return self.a.shape[0]

    @property
    def in_features(self) -> int:
        """Size of the layer's input."""
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the layer's output."""
        return self.b.shape[0]

    def delta(self) -> Tensor:
        """The correction itself, ``scale * b a``, ``[out, in]``, in float32 at least."""
        wide = wide_dtype(self.a.dtype, self.b.dtype)
        return self.scale * (self.b.to(wide) @ self.a.to(wide))

    def folded(self) -> LowRank:
        """The same correction with scale 1, multiplied into ``b``; factors in float32 at least."""
        wide = wide_dtype(self.a.dtype, self.b.dtype)
        return LowRank(self.a.to(wide), self.b.to(wide) * self.scale)

    def minus(self, other: LowRank) -> LowRank:
        """The difference of two corrections of one scale, whose rank is the sum of theirs."""
        return LowRank(torch.cat([self.a, other.a]), torch.cat([self.b, -other.b], dim=1), self.scale)

    def is_finite(self) -> bool:
        """Return True when there is neither a NaN nor an infinity in the factors and the scale."""
        finite = (factor.to(wide_dtype(factor.dtype)).isfinite().all() for factor in (self.a, self.b))
        return all(map(bool, finite)) and math.isfinite(self.scale)


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the type that corrections of these types are worked out in: float64 with one of it, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def shared_part(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of rank ``rank`` to ``mean_i b_i a_i``, as factors ``[G, q] [q, F]`` with ``q <= rank``.

    ``a: [T, r, F]``, ``b: [T, G, r]``. The mean is the product of the stacked factors ``[G, T r] [T r, F] / T``.
    """
    stacked_a = a.flatten(0, 1).unsqueeze(0)
    stacked_b = b.transpose(0, 1).flatten(1).unsqueeze(0) / len(b)
    u, values, vh = decompose(stacked_a, stacked_b)
    return u[0, :, :rank] * values[0, :rank], vh[0, : min(rank, values.shape[1])]


def decompose(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of ``b a``: ``u [T, G, k]``, ``values [T, k]``, ``vh [T, h, F]``, ``h >= k``.

    ``a: [T, n, F]``, ``b: [T, G, n]``; ``vh`` has further orthonormal rows where ``a`` has the room, so that there
    are directions for components without a singular value.
    """
    basis_b, core_b = torch.linalg.qr(b)
    basis_a, core_a = torch.linalg.qr(a.transpose(1, 2))
    u, values, vh = torch.linalg.svd(core_b @ core_a.transpose(1, 2), full_matrices=True)
    return basis_b @ u[:, :, : values.shape[1]], values, vh @ basis_a.transpose(1, 2)


def balanced(
    u: Tensor, values: Tensor, vh: Tensor, rank: int, nothing: Tensor, short: float
) -> tuple[Tensor, Tensor]:
    """Factors ``a [T, rank, F]`` and ``b [T, G, rank]`` of the leading singular triples, ``b^T b = a a^T``.

    Components whose value is not above ``nothing [T]`` start again as fresh ones do: ``b = 0`` and a row of ``a``
    of the length ``short``, in a direction that no other component has, so that gradients reach them.
    """
    kept = min(rank, values.shape[1])
    directions = min(rank, vh.shape[1])
    roots = values.new_zeros(len(values), rank)
    roots[:, :kept] = values[:, :kept].sqrt()
    empty = roots.square() <= nothing.unsqueeze(1)
    a = vh.new_zeros(len(vh), rank, vh.shape[2])
    b = u.new_zeros(len(u), u.shape[1], rank)
    b[:, :, :kept] = u[:, :, :kept]
    a[:, :directions] = vh[:, :directions]
    return torch.where(empty, short, roots).unsqueeze(2) * a, roots.masked_fill(empty, 0.0).unsqueeze(1) * b


def aligned(a: Tensor, b: Tensor, old_a: Tensor, old_b: Tensor) -> tuple[Tensor, Tensor]:
    """``o^T a`` and ``b o`` with the orthogonal ``o`` that brings them nearest to the old factors."""
    u, _, vh = torch.linalg.svd(b.transpose(1, 2) @ old_b + a @ old_a.transpose(1, 2))
    o = u @ vh
    return o.transpose(1, 2) @ a, b @ o
