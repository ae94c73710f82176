"""Share in one layer: two orthonormal bases, and every task's coefficients in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varshare_rl.adapters.adapter import LowRank
from varshare_rl.transfer.share.config import THIRD, BasisMethod, ShareConfig, new_columns
from varshare_rl.transfer.share.factors import (
    FACTOR_ROUNDING,
    NUMERICAL_ZERO,
    balance,
    distance,
    norm,
    orthonormal,
    relative,
    stack,
)


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of one task in one layer: ``dW = (basis_B eps_B) (basis_A eps_A)^T``.

    Attributes:
        eps_B: ``[k_B, p]``; eps_A: ``[k_A, p]``.
        std_B, std_A: standard deviations of their Gaussian posterior, in the same shapes; None: they are points.
    """

    eps_B: Tensor
    eps_A: Tensor
    std_B: Tensor | None = None
    std_A: Tensor | None = None

    def numbers(self) -> int:
        """Count the numbers that are stored."""
        parts = (self.eps_B, self.eps_A, self.std_B, self.std_A)
        return sum(part.numel() for part in parts if part is not None)


def mapped(tasks: Sequence[Coefficients], to_B: Tensor, to_A: Tensor) -> tuple[Coefficients, ...]:
    """Return the same in another basis: means by ``T``, variances by ``T^2`` entry by entry (its marginals).

    ``to_B: [k_B', k_B]``, ``to_A: [k_A', k_A]`` in float64. All tasks' columns go through one product.
    """
    widths = [own.eps_B.shape[1] for own in tasks]
    sides = (
        torch.split((to @ torch.cat([getattr(own, name) for own in tasks], dim=1).double()).float(), widths, dim=1)
        for to, name in ((to_B, "eps_B"), (to_A, "eps_A"))
    )
    return tuple(
        Coefficients(eps_B.contiguous(), eps_A.contiguous(), _sigma(own.std_B, to_B), _sigma(own.std_A, to_A))
        for own, eps_B, eps_A in zip(tasks, *sides, strict=True)
    )


def _sigma(std: Tensor | None, to: Tensor) -> Tensor | None:
    return None if std is None else (to.square() @ std.double().square()).sqrt().float()


@dataclass(frozen=True)
class LayerBasis:
    """The basis of one layer and the coefficients of all tasks, in float32.

    Attributes:
        basis_B: ``[out, k_B]``, orthonormal columns; basis_A: ``[in, k_A]``, likewise. ``k_B`` and ``k_A`` differ
            only where a side has fewer directions than ``k``.
        coefficients: of every task, in order.
        norms: Frobenius norm of every task's original ``dW``.
        errors: bounds on ``||dW - rebuilt|| / ||dW||`` of every task. Exact since the task's original was last at
            hand, but for a bound on rounding :meth:`rebuild` to float32; later merges add how far each moves the
            task.
    """

    basis_B: Tensor
    basis_A: Tensor
    coefficients: tuple[Coefficients, ...]
    norms: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def k(self) -> int:
        """The number of directions."""
        return max(self.basis_B.shape[1], self.basis_A.shape[1])

    @property
    def features(self) -> tuple[int, int]:
        """Sizes of the layer's output and input."""
        return self.basis_B.shape[0], self.basis_A.shape[0]

    def shared_numbers(self) -> int:
        """Count the numbers of the bases."""
        return self.basis_B.numel() + self.basis_A.numel()

    def task_numbers(self, index: int) -> int:
        """Count the numbers of one task."""
        return self.coefficients[index].numbers()

    def trained_numbers(self) -> int:
        """Count the coefficients that a new task trains, with a third of the largest rank here as columns."""
        columns = new_columns(THIRD, [own.eps_B.shape[1] for own in self.coefficients])
        return columns * (self.basis_B.shape[1] + self.basis_A.shape[1])

    def rebuild(self, index: int) -> LowRank:
        """Return a task's correction as factors of rank ``p``: ``b = basis_B eps_B``, ``a = (basis_A eps_A)^T``."""
        return rebuilt(self.basis_B, self.basis_A, self.coefficients[index])

    def with_task(self, own: Coefficients, size: float, error: float) -> LayerBasis:
        """Return the same basis with one more task."""
        return replace(
            self,
            coefficients=(*self.coefficients, own),
            norms=(*self.norms, size),
            errors=(*self.errors, error),
        )

    def with_coefficients(self, index: int, own: Coefficients) -> LayerBasis:
        """Return the same with other coefficients of one task, which from now on is measured against these."""
        size = float(norm(own.eps_B.double()[None], own.eps_A.double()[None]))
        before, after = slice(index), slice(index + 1, None)
        return replace(
            self,
            coefficients=(*self.coefficients[before], own, *self.coefficients[after]),
            norms=(*self.norms[before], size, *self.norms[after]),
            errors=(*self.errors[before], 0.0, *self.errors[after]),
        )

    def with_projected(self, adapter: LowRank, config: ShareConfig) -> LayerBasis:
        """Return the same basis with one more task, projected onto it."""
        left, right = canonical_factors([adapter], config)
        norms = norm(left, right)
        (exact_B, fix_B), (exact_A, fix_A) = orthonormal(self.basis_B), orthonormal(self.basis_A)
        (own,), _ = choose_coefficients(exact_B.t() @ left, exact_A.t() @ right, norms, [adapter.rank], config)
        (own,) = mapped([own], fix_B.inverse(), fix_A.inverse())
        error = measured(self.basis_B, self.basis_A, [own], left, right, norms)
        return self.with_task(own, float(norms), float(error))


def rebuilt(basis_B: Tensor, basis_A: Tensor, own: Coefficients) -> LowRank:
    """Return a task's correction as factors of rank ``p``, worked out in float64 and rounded to float32 once."""
    a, b = basis_A.double() @ own.eps_A.double(), basis_B.double() @ own.eps_B.double()
    return LowRank(a.t().float().contiguous(), b.float())


def measured(
    basis_B: Tensor, basis_A: Tensor, tasks: Sequence[Coefficients], left: Tensor, right: Tensor, norms: Tensor
) -> Tensor:
    """Return bounds ``[n]`` on the relative errors of what is rebuilt for factors ``left``, ``right``."""
    made_left = basis_B.double() @ stack([own.eps_B for own in tasks])
    made_right = basis_A.double() @ stack([own.eps_A for own in tasks])
    return relative(distance(left, right, made_left, made_right), norms) + rounding(tasks, norms)


def moved(before: LayerBasis, basis_B: Tensor, basis_A: Tensor, tasks: Sequence[Coefficients]) -> Tensor:
    """Return how far tasks are from where they were, relative to their originals, ``[t]``."""
    sides = []
    for old, new, name in ((before.basis_B, basis_B, "eps_B"), (before.basis_A, basis_A, "eps_A")):
        triangle = torch.linalg.qr(torch.cat([old, new], dim=1).double(), mode="r").R  # of both bases' span
        old_own, new_own = (stack([getattr(own, name) for own in every]) for every in (before.coefficients, tasks))
        sides.append((triangle[:, : old.shape[1]] @ old_own, triangle[:, old.shape[1] :] @ new_own))
    (old_left, new_left), (old_right, new_right) = sides
    norms = torch.tensor(before.norms, dtype=torch.float64)
    return relative(distance(old_left, old_right, new_left, new_right), norms)


def rounding(tasks: Sequence[Coefficients], norms: Tensor) -> Tensor:
    """Return bounds ``[t]`` on the relative error of rounding rebuilt factors to float32."""
    sizes = [float(own.eps_B.double().norm()) * float(own.eps_A.double().norm()) for own in tasks]
    return relative(FACTOR_ROUNDING * torch.tensor(sizes, dtype=torch.float64), norms)


def canonical_factors(adapters: Sequence[LowRank], config: ShareConfig) -> tuple[Tensor, Tensor]:
    """Return adapters' factors ``[N, out, R], [N, in, R]`` with scales folded in; canonical but for ``paper``."""
    scales = torch.tensor([adapter.scale for adapter in adapters], dtype=torch.float64)
    left = stack([adapter.b for adapter in adapters]) * scales.view(-1, 1, 1)
    right = stack([adapter.a.t() for adapter in adapters])
    return (left, right) if config.method is BasisMethod.paper else balance(left, right)[:2]


def choose_coefficients(
    left: Tensor, right: Tensor, norms: Tensor, ranks: Sequence[int], config: ShareConfig
) -> tuple[list[Coefficients], Tensor]:
    """Choose coefficients of adapters with ``left [N, k_B, R]``, ``right [N, k_A, R]`` in a basis; and errors.

    ``share``: the core ``C = left right^T`` truncated to rank ``p`` by its SVD, ``sqrt(S)`` on either side.
    ``paper``: the first ``p`` columns of the projections. The error has two parts that are orthogonal to each
    other, outside the basis and inside: ``||dW||^2 - ||C||^2 + ||C - eps_B eps_A^T||^2``.
    """
    if config.method is BasisMethod.paper:
        widths = torch.tensor(ranks)
        chosen_left, chosen_right = left, right
    else:
        chosen_left, chosen_right, singular = balance(left, right)
        widths = (singular > NUMERICAL_ZERO * singular[:, :1]).sum(1).clamp_min(1)
    if config.p is not None:
        widths = widths.clamp_max(config.p)
    kept = (torch.arange(chosen_left.shape[2]) < widths[:, None]).unsqueeze(1)
    chosen_left, chosen_right = chosen_left * kept, chosen_right * kept
    own = [
        Coefficients(stored(eps_B[:, :width]), stored(eps_A[:, :width]))
        for eps_B, eps_A, width in zip(chosen_left, chosen_right, widths.tolist(), strict=True)
    ]
    outside = norms.square() - norm(left, right).square()
    inside = distance(left, right, chosen_left, chosen_right)
    return own, (outside.clamp_min(0.0) + inside.square()).sqrt()


def stored(tensor: Tensor) -> Tensor:
    """Return a tensor in the type that bases are kept in."""
    return tensor.float().contiguous()
