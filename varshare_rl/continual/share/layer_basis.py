"""Share in one layer: two orthonormal bases, and every task's coefficients in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varshare_rl.adapters.adapter import LowRank
from varshare_rl.continual.share.factors import (
    NUMERICAL_ZERO,
    balance,
    captured,
    compress,
    distance,
    left_singular,
    norm,
    relative,
    stack,
)
from varshare_rl.continual.share.options import Method, ShareOptions
from varshare_rl.continual.share.size import ErrorsAt, choose_k
from varshare_rl.types import UserError


@dataclass(frozen=True)
class Coefficients:
    """What one task has in one layer: ``dW = (basis_B eps_B) (basis_A eps_A)^T``.

    Attributes:
        eps_B: ``[k_B, p]``; eps_A: ``[k_A, p]``.
        std_B, std_A: standard deviations of their Gaussian posterior, in the same shapes; None: they are points.
    """

    eps_B: Tensor
    eps_A: Tensor
    std_B: Tensor | None = None
    std_A: Tensor | None = None

    def numbers(self) -> int:
        """How many numbers are stored."""
        parts = (self.eps_B, self.eps_A, self.std_B, self.std_A)
        return sum(part.numel() for part in parts if part is not None)

    def mapped(self, to_B: Tensor, to_A: Tensor) -> Coefficients:
        """The same in another basis: means by ``T``, variances by ``T^2`` entry by entry (its marginals)."""
        stds = (
            None if std is None else (to.square() @ std.double().square()).sqrt().float()
            for to, std in ((to_B, self.std_B), (to_A, self.std_A))
        )
        return Coefficients((to_B @ self.eps_B.double()).float(), (to_A @ self.eps_A.double()).float(), *stds)


@dataclass(frozen=True)
class LayerBasis:
    """The basis of one layer and the coefficients of all tasks, in float32.

    Attributes:
        basis_B: ``[out, k_B]``, orthonormal columns; basis_A: ``[in, k_A]``, likewise. ``k_B`` and ``k_A`` differ
        only
            where a side has fewer directions than ``k``.
        coefficients: of every task, in order.
        norms: Frobenius norm of every task's original ``dW``.
        errors: ``||dW - rebuilt|| / ||dW||`` of every task. Exact since the task's original was last at hand; later
            merges add how far each moves the task, so that it stays an upper bound.
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
        """How many numbers the bases have."""
        return self.basis_B.numel() + self.basis_A.numel()

    def task_numbers(self, index: int) -> int:
        """How many numbers one task has of its own."""
        return self.coefficients[index].numbers()

    def rebuild(self, index: int) -> LowRank:
        """One task's correction as factors of rank ``p``: ``b = basis_B eps_B``, ``a = (basis_A eps_A)^T``."""
        own = self.coefficients[index]
        return LowRank((self.basis_A @ own.eps_A).t().contiguous(), self.basis_B @ own.eps_B)

    def with_task(self, own: Coefficients, size: float, error: float) -> LayerBasis:
        """The same basis with one more task."""
        return replace(
            self,
            coefficients=(*self.coefficients, own),
            norms=(*self.norms, size),
            errors=(*self.errors, error),
        )

    def with_coefficients(self, index: int, own: Coefficients) -> LayerBasis:
        """The same with other coefficients of one task, which from now on is measured against these."""
        size = float(norm(own.eps_B.double()[None], own.eps_A.double()[None]))
        changed = [list(part) for part in (self.coefficients, self.norms, self.errors)]
        for part, value in zip(changed, (own, size, 0.0), strict=True):
            part[index] = value
        coefficients, norms, errors = (tuple(part) for part in changed)
        return replace(self, coefficients=coefficients, norms=norms, errors=errors)  # type: ignore[arg-type]

    def project(self, adapter: LowRank, options: ShareOptions) -> tuple[Coefficients, float, float]:
        """An adapter's coefficients in this basis, its norm, and the relative error of what they rebuild."""
        left, right = _factors([adapter], options)
        norms = norm(left, right)
        left, right = self.basis_B.double().t() @ left, self.basis_A.double().t() @ right
        (own,), error = _coefficients(left, right, norms, [adapter.rank], options)
        return own, float(norms), float(relative(error, norms))


def fit(past: LayerBasis | None, new: Sequence[LowRank], options: ShareOptions, names: Sequence[str]) -> LayerBasis:
    """Merge new adapters of a layer with the tasks of its basis: another basis, all tasks' coefficients in it.

    ``share``: every adapter in canonical form ``U sqrt(S), V sqrt(S)``; the left singular vectors of all tasks'
    factors side by side are the basis. The tasks already held count with their rebuilt factors, whose columns are
    first compressed to at most ``k`` with the same singular vectors, so that the decomposition does not grow with
    the number of tasks. ``paper``: the factors as they are, minus the mean column.

    Args:
        past: what there is; None at the beginning.
        new: the new tasks' adapters of this layer, of any ranks.
        options: method, rule for ``k``, and ``p``.
        names: all tasks, the new ones last; for messages.

    Raises:
        UserError: ``paper`` finds nothing after centring, or ``max_error`` cannot be met.
    """
    ranks = [adapter.rank for adapter in new]
    left, right = _factors(new, options)
    norms = norm(left, right)
    columns_B, columns_A = _columns(left, ranks), _columns(right, ranks)
    old = _Old(past, options) if past is not None else None
    if old is not None:
        columns_B = torch.cat([old.columns_B, columns_B], dim=1)
        columns_A = torch.cat([old.columns_A, columns_A], dim=1)
    all_B, spectrum_B = _directions(columns_B, options)
    all_A, spectrum_A = _directions(columns_A, options)
    left, right = all_B.t() @ left, all_A.t() @ right
    new_errors = _errors_by_k(left, right, norms, ranks, options)
    old_errors = None if old is None else old.errors_by_k(all_B, all_A)

    def errors_at(k: int) -> Tensor:
        of_new = relative(new_errors(k), norms)
        return of_new if old_errors is None else torch.cat([old_errors(k), of_new])

    before = torch.zeros(len(new), dtype=torch.float64)
    if old is not None:
        before = torch.cat([old.errors, before])
    k = choose_k(options.size(), (spectrum_B, spectrum_A), errors_at, before, names)
    own, _ = _coefficients(left[:, :k], right[:, :k], norms, ranks, options)
    errors = tuple(errors_at(k).tolist())
    basis_B, basis_A = all_B[:, :k], all_A[:, :k]
    if past is None:
        return LayerBasis(_stored(basis_B), _stored(basis_A), tuple(own), tuple(norms.tolist()), errors)
    to_B, to_A = basis_B.t() @ past.basis_B.double(), basis_A.t() @ past.basis_A.double()
    mapped = [coefficients.mapped(to_B, to_A) for coefficients in past.coefficients]
    return LayerBasis(_stored(basis_B), _stored(basis_A), (*mapped, *own), (*past.norms, *norms.tolist()), errors)


class _Old:
    """The tasks that a basis holds, as a merge sees them."""

    def __init__(self, past: LayerBasis, options: ShareOptions) -> None:
        self.basis_B, self.basis_A = past.basis_B.double(), past.basis_A.double()
        self.left = stack([own.eps_B for own in past.coefficients])  # [t, k_B, p]
        self.right = stack([own.eps_A for own in past.coefficients])  # [t, k_A, p]
        self.errors = torch.tensor(past.errors, dtype=torch.float64)
        self.norms = torch.tensor(past.norms, dtype=torch.float64)
        if options.method is Method.paper:
            ranks = [own.eps_B.shape[1] for own in past.coefficients]
            inside_B, inside_A = _columns(self.left, ranks), _columns(self.right, ranks)
        else:
            balanced_B, balanced_A, _ = balance(self.left, self.right)
            inside_B, inside_A = (side.movedim(0, 1).flatten(1) for side in (balanced_B, balanced_A))
            inside_B, inside_A = compress(inside_B), compress(inside_A)
        self.columns_B, self.columns_A = self.basis_B @ inside_B, self.basis_A @ inside_A

    def errors_by_k(self, all_B: Tensor, all_A: Tensor) -> ErrorsAt:
        """Bounds on the errors with ``k`` directions: those before, plus how far each task is moved."""
        left, right = all_B.t() @ self.basis_B @ self.left, all_A.t() @ self.basis_A @ self.right
        moved = _leftover(norm(self.left, self.right), captured(left, right))
        return lambda k: self.errors + relative(moved[:, k - 1], self.norms)


def _factors(adapters: Sequence[LowRank], options: ShareOptions) -> tuple[Tensor, Tensor]:
    """The adapters' factors ``[N, out, R], [N, in, R]`` with the scales folded in; canonical but for ``paper``."""
    folded = [adapter.folded() for adapter in adapters]
    left, right = stack([adapter.b for adapter in folded]), stack([adapter.a.t() for adapter in folded])
    return (left, right) if options.method is Method.paper else balance(left, right)[:2]


def _columns(factors: Tensor, ranks: Sequence[int]) -> Tensor:
    """``[N, G, R]`` side by side without what was filled up: ``[G, sum of ranks]``."""
    return torch.cat([factor[:, :rank] for factor, rank in zip(factors, ranks, strict=True)], dim=1)


def _directions(columns: Tensor, options: ShareOptions) -> tuple[Tensor, Tensor]:
    if options.method is not Method.paper:
        return left_singular(columns)
    centred = columns - columns.mean(dim=1, keepdim=True)
    if float(centred.norm()) <= NUMERICAL_ZERO * float(columns.norm()):
        raise UserError(
            "method=paper centres the factors, and nothing of these is left by that (one adapter of rank 1 has one "
            "column, its own mean); use method=share"
        )
    return left_singular(centred)


def _errors_by_k(
    left: Tensor, right: Tensor, norms: Tensor, ranks: Sequence[int], options: ShareOptions
) -> ErrorsAt:
    """Errors of new tasks with ``k`` directions, from their factors in all directions."""
    if options.p is not None:
        return lambda k: _coefficients(left[:, :k], right[:, :k], norms, ranks, options)[1]
    missed = _leftover(norms, captured(left, right))
    return lambda k: missed[:, k - 1]


def _leftover(norms: Tensor, squares: Tensor) -> Tensor:
    """Norms of what is left of ``[N]`` when parts with ``squares [N, K]`` are taken away."""
    return (norms.square().unsqueeze(1) - squares).clamp_min(0.0).sqrt()


def _coefficients(
    left: Tensor, right: Tensor, norms: Tensor, ranks: Sequence[int], options: ShareOptions
) -> tuple[list[Coefficients], Tensor]:
    """Coefficients of adapters that have ``left [N, k_B, R]``, ``right [N, k_A, R]`` in a basis, and their errors.

    ``share``: the core ``C = left right^T`` truncated to rank ``p`` by its SVD, ``sqrt(S)`` on either side.
    ``paper``: the first ``p`` columns of the projections. The error has two parts that are orthogonal to each
    other, outside the basis and inside: ``||dW||^2 - ||C||^2 + ||C - eps_B eps_A^T||^2``.
    """
    if options.method is Method.paper:
        widths = torch.tensor(ranks)
        chosen_left, chosen_right = left, right
    else:
        chosen_left, chosen_right, singular = balance(left, right)
        widths = (singular > NUMERICAL_ZERO * singular[:, :1]).sum(1).clamp_min(1)
    if options.p is not None:
        widths = widths.clamp_max(options.p)
    kept = (torch.arange(chosen_left.shape[2]) < widths[:, None]).unsqueeze(1)
    chosen_left, chosen_right = chosen_left * kept, chosen_right * kept
    own = [
        Coefficients(_stored(eps_B[:, :width]), _stored(eps_A[:, :width]))
        for eps_B, eps_A, width in zip(chosen_left, chosen_right, widths.tolist(), strict=True)
    ]
    outside = norms.square() - norm(left, right).square()
    inside = distance(left, right, chosen_left, chosen_right)
    return own, (outside.clamp_min(0.0) + inside.square()).sqrt()


def _stored(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()
