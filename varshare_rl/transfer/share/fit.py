"""Decomposition: the basis of a layer from new adapters and the tasks that it holds already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varshare_rl.adapters.adapter import LowRank
from varshare_rl.errors import UserError
from varshare_rl.transfer.share.config import BasisMethod, ShareConfig, SizeConfig
from varshare_rl.transfer.share.factors import (
    NUMERICAL_ZERO,
    balance,
    compress,
    left_singular,
    norm,
    orthonormal,
    relative,
    stack,
)
from varshare_rl.transfer.share.layer_basis import (
    Coefficients,
    LayerBasis,
    canonical_factors,
    choose_coefficients,
    mapped,
    measured,
    moved,
    rounding,
    stored,
)

#: Part of an error that is left to rounding to float32; an error that is not allowed to grow may grow by it.
ROUNDING = 1e-6

#: Errors ``[t]`` that all tasks would have with ``k`` directions.
ErrorsAt = Callable[[int], Tensor]


def fit(past: LayerBasis | None, new: Sequence[LowRank], config: ShareConfig, names: Sequence[str]) -> LayerBasis:
    """Merge new adapters of a layer with the tasks of its basis: another basis, all tasks' coefficients in it.

    ``share``: every adapter in canonical form ``U sqrt(S), V sqrt(S)``; the left singular vectors of all tasks'
    factors side by side are the basis. The tasks already held count with their rebuilt factors, whose columns are
    first compressed to at most ``k`` with the same singular vectors, so that the decomposition does not grow with
    the number of tasks. ``paper``: the factors as they are, minus the mean column.

    Under ``max_error`` there is a second candidate, the old basis with further directions for what it lacks of the
    new adapters; the one with the smaller ``k`` is taken. Without it a task that is at the bound, and so must not
    be moved at all, would need nearly every direction there is.

    Args:
        past: what there is; None at the beginning.
        new: the new tasks' adapters of this layer, of any ranks.
        config: method, rule for ``k``, and ``p``.
        names: all tasks, the new ones last; for messages.

    Raises:
        UserError: ``paper`` finds nothing after centring, or ``max_error`` cannot be met.
    """
    added = _New(new, config)
    held = None if past is None else _Held(past, config)
    chosen = _decomposed(added, held, config)
    k = _choose(chosen, added, held, config, names)
    if past is not None and held is not None and config.size().max_error is not None and k > past.k:
        longer = _extended(added, held)
        least = _choose(longer, added, held, config, names)
        if least < k:
            chosen, k = longer, least
    basis_B, basis_A = chosen.basis_B[:, :k], chosen.basis_A[:, :k]
    own, _ = added.project(basis_B, basis_A)
    kept_B, kept_A = stored(basis_B), stored(basis_A)
    errors = measured(kept_B, kept_A, own, added.left, added.right, added.norms)
    check_kept(errors, config.size(), names[-len(new) :])
    if past is None or held is None:
        return LayerBasis(kept_B, kept_A, tuple(own), tuple(added.norms.tolist()), tuple(errors.tolist()))
    to_B, to_A = basis_B.t() @ past.basis_B.double(), basis_A.t() @ past.basis_A.double()
    old = mapped(past.coefficients, to_B, to_A)
    exact = (held.errors - rounding(past.coefficients, held.norms)).clamp_min(0.0)
    bounds = exact + moved(past, kept_B, kept_A, old) + rounding(old, held.norms)
    return LayerBasis(
        kept_B,
        kept_A,
        (*old, *own),
        (*past.norms, *added.norms.tolist()),
        (*bounds.tolist(), *errors.tolist()),
    )


def check_kept(errors: Tensor, rule: SizeConfig, names: Sequence[str]) -> None:
    """Refuse a basis that float32 cannot hold as well as it was asked for."""
    allowed = torch.inf if rule.max_error is None else max(rule.max_error, 2 * ROUNDING)
    if not bool((errors <= allowed).all()):  # NaN is not
        worst = int(errors.nan_to_num(torch.inf).argmax())
        raise UserError(
            f"task {names[worst]!r} has a relative error of {float(errors[worst]):.3g} in float32, in which a "
            "basis is kept: its numbers are too large or too small beside each other; leave it out or rescale it"
        )


class _New:
    """The adapters of the new tasks."""

    def __init__(self, adapters: Sequence[LowRank], config: ShareConfig) -> None:
        self.config = config
        self.ranks = [adapter.rank for adapter in adapters]
        self.left, self.right = canonical_factors(adapters, config)
        self.norms = norm(self.left, self.right)
        self.columns_B, self.columns_A = _columns(self.left, self.ranks), _columns(self.right, self.ranks)

    def project(self, basis_B: Tensor, basis_A: Tensor) -> tuple[list[Coefficients], Tensor]:
        """Return coefficients in a basis and absolute errors."""
        left, right = basis_B.t() @ self.left, basis_A.t() @ self.right
        return choose_coefficients(left, right, self.norms, self.ranks, self.config)

    def errors_in(self, basis_B: Tensor, basis_A: Tensor) -> Tensor:
        """Return relative errors in a basis, ``[n]``."""
        if self.config.p is not None:
            return relative(self.project(basis_B, basis_A)[1], self.norms)
        inside = norm(basis_B.t() @ self.left, basis_A.t() @ self.right)
        return relative((self.norms.square() - inside.square()).clamp_min(0.0).sqrt(), self.norms)


class _Held:
    """The tasks that a basis holds."""

    def __init__(self, past: LayerBasis, config: ShareConfig) -> None:
        (self.basis_B, fix_B), (self.basis_A, fix_A) = orthonormal(past.basis_B), orthonormal(past.basis_A)
        self.left = fix_B @ stack([own.eps_B for own in past.coefficients])  # [t, k_B, p]
        self.right = fix_A @ stack([own.eps_A for own in past.coefficients])  # [t, k_A, p]
        self.now = norm(self.left, self.right)
        self.errors = torch.tensor(past.errors, dtype=torch.float64)
        self.norms = torch.tensor(past.norms, dtype=torch.float64)
        if config.method is BasisMethod.paper:
            ranks = [own.eps_B.shape[1] for own in past.coefficients]
            inside_B, inside_A = _columns(self.left, ranks), _columns(self.right, ranks)
        else:
            balanced_B, balanced_A, _ = balance(self.left, self.right)
            inside_B, inside_A = (compress(side.movedim(0, 1).flatten(1)) for side in (balanced_B, balanced_A))
        self.columns_B, self.columns_A = self.basis_B @ inside_B, self.basis_A @ inside_A

    def errors_in(self, basis_B: Tensor, basis_A: Tensor) -> Tensor:
        """Return bounds on the errors in another basis: those before, plus how far each task is moved, ``[t]``."""
        left, right = (basis_B.t() @ self.basis_B) @ self.left, (basis_A.t() @ self.basis_A) @ self.right
        moved = (self.now.square() - norm(left, right).square()).clamp_min(0.0).sqrt()
        return self.errors + relative(moved, self.norms)


@dataclass(frozen=True)
class _Candidate:
    """All directions of both sides, the first ``k`` of which may become the basis."""

    basis_B: Tensor  # [out, K_B]
    basis_A: Tensor  # [in, K_A]
    spectra: tuple[Tensor, Tensor]  # singular values [K_B], [K_A]
    least: int = 1  # fewer than these would drop what the candidate is there to keep


def _decomposed(added: _New, held: _Held | None, config: ShareConfig) -> _Candidate:
    """Return the left singular vectors of all tasks' factors."""
    sides = []
    for name in ("columns_B", "columns_A"):
        columns = getattr(added, name)
        if held is not None:
            columns = torch.cat([getattr(held, name), columns], dim=1)
        sides.append(_directions(columns, config))
    (basis_B, spectrum_B), (basis_A, spectrum_A) = sides
    return _Candidate(basis_B, basis_A, (spectrum_B, spectrum_A))


def _extended(added: _New, held: _Held) -> _Candidate:
    """Return the old basis, then the left singular vectors of what it lacks of the new adapters."""
    pairs = ((held.basis_B, added.columns_B), (held.basis_A, added.columns_A))
    basis_B, basis_A = (_appended(basis, columns) for basis, columns in pairs)
    spectra = (torch.ones(basis_B.shape[1]), torch.ones(basis_A.shape[1]))  # only their number is asked for
    return _Candidate(basis_B, basis_A, spectra, least=max(held.basis_B.shape[1], held.basis_A.shape[1]))


def _appended(basis: Tensor, columns: Tensor) -> Tensor:
    """Return a basis, and the directions that columns have beside it."""
    directions, _ = left_singular(columns - basis @ (basis.t() @ columns))
    directions = directions[:, : basis.shape[0] - basis.shape[1]]
    exact: Tensor = torch.linalg.qr(torch.cat([basis, directions], dim=1)).Q
    return torch.cat([basis, exact[:, basis.shape[1] :]], dim=1)


def _errors(candidate: _Candidate, k: int, added: _New, held: _Held | None) -> Tensor:
    """Return relative errors of all tasks with the first ``k`` directions of a candidate, earlier tasks first."""
    basis_B, basis_A = candidate.basis_B[:, :k], candidate.basis_A[:, :k]
    errors = added.errors_in(basis_B, basis_A)
    if held is None:
        return errors
    if k < candidate.least:
        return torch.full((len(held.errors) + len(errors),), torch.inf, dtype=torch.float64)
    return torch.cat([held.errors_in(basis_B, basis_A), errors])


def _choose(
    candidate: _Candidate, added: _New, held: _Held | None, config: ShareConfig, names: Sequence[str]
) -> int:
    before = torch.zeros(len(added.ranks), dtype=torch.float64)
    if held is not None:
        before = torch.cat([held.errors, before])
    return choose_k(config.size(), candidate.spectra, lambda k: _errors(candidate, k, added, held), before, names)


def _columns(factors: Tensor, ranks: Sequence[int]) -> Tensor:
    """Put ``[N, G, R]`` side by side without what was filled up: ``[G, sum of ranks]``."""
    return torch.cat([factor[:, :rank] for factor, rank in zip(factors, ranks, strict=True)], dim=1)


def _directions(columns: Tensor, config: ShareConfig) -> tuple[Tensor, Tensor]:
    if config.method is not BasisMethod.paper:
        return left_singular(columns)
    centred = columns - columns.mean(dim=1, keepdim=True)
    if float(centred.norm()) <= NUMERICAL_ZERO * float(columns.norm()):
        raise UserError(
            "method=paper centres the factors, and nothing of these is left by that (one adapter of rank 1 has one "
            "column, its own mean); use method=share"
        )
    return left_singular(centred)


def choose_k(
    rule: SizeConfig, spectra: Sequence[Tensor], errors_at: ErrorsAt, before: Tensor, names: Sequence[str]
) -> int:
    """Choose the number of directions by the rule.

    Args:
        rule: see :class:`SizeConfig`; one of its three is given.
        spectra: singular values of each side, decreasing.
        errors_at: relative errors ``[t]`` for a number of directions; they do not grow with it.
        before: errors ``[t]`` that the tasks had before this merge, which no basis can mend; 0 for new ones.
        names: the tasks.

    Raises:
        UserError: no number of directions keeps to ``max_error``; the message names the task.
    """
    most = max(len(spectrum) for spectrum in spectra)
    if rule.fixed is not None:
        return min(rule.fixed, most)
    if rule.explained is not None:
        return max(explaining(spectrum, rule.explained) for spectrum in spectra)
    assert rule.max_error is not None
    allowed = torch.clamp_min(before + ROUNDING, max(rule.max_error - ROUNDING, ROUNDING))
    excess = errors_at(most) - allowed
    if bool((excess > 0).any()):
        worst = int(excess.argmax())
        raise UserError(
            f"k.max_error={rule.max_error} cannot be met: with all {most} directions task {names[worst]!r} has an "
            f"error of {float(errors_at(most)[worst]):.3g}; give a larger p or k.max_error, or method=share"
        )
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if bool((errors_at(middle) <= allowed).all()):
            high = middle
        else:
            low = middle
    return high


def explaining(spectrum: Tensor, fraction: float) -> int:
    """Return the least ``k`` with ``sum_{j<=k} s_j^2 >= fraction * sum_j s_j^2``."""
    explained = spectrum.square().cumsum(0)
    return int((explained < fraction * explained[-1] * (1 - 1e-12)).sum()) + 1
