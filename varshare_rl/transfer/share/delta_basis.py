"""``method: delta``: a layer's basis is made of whole corrections, its coefficients are ``k`` numbers per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varshare_rl.adapters.adapter import LowRank
from varshare_rl.transfer.share.config import ShareConfig
from varshare_rl.transfer.share.factors import FACTOR_ROUNDING, relative
from varshare_rl.transfer.share.fit import check_kept, choose_k

#: Singular values below this part of the largest are left out of rebuilt factors: float32 has no more.
RANK_TOLERANCE = 2.0**-24


@dataclass(frozen=True)
class DeltaBasis:
    """``dW_i = mean + sum_j coefficients[i, j] basis[j]``.

    The top ``k`` right singular vectors of the tasks' flattened corrections ``[t, out * in]``, minus their mean if
    ``config.centred``. It is the best basis of its kind, and a large one: ``k * out * in`` numbers.

    Attributes:
        basis: ``[k, out, in]``, orthonormal; coefficients: ``[t, k]``; norms, errors: as in
            :class:`~varshare_rl.transfer.share.layer_basis.LayerBasis`.
        mean: ``[out, in]``; None: not centred.
    """

    basis: Tensor
    coefficients: Tensor
    norms: tuple[float, ...]
    errors: tuple[float, ...]
    mean: Tensor | None = None

    @property
    def k(self) -> int:
        """The number of directions."""
        return self.basis.shape[0]

    @property
    def features(self) -> tuple[int, int]:
        """Sizes of the layer's output and input."""
        return self.basis.shape[1], self.basis.shape[2]

    def shared_numbers(self) -> int:
        """Count the numbers of the basis."""
        return self.basis.numel() + (0 if self.mean is None else self.mean.numel())

    def task_numbers(self, index: int) -> int:
        """Count the numbers of one task."""
        return self.coefficients.shape[1]

    def trained_numbers(self) -> int:
        """Count the coefficients of a new task."""
        return self.k

    def rebuild(self, index: int) -> LowRank:
        """Return one task's correction as factors, of whatever rank it has, ``min(out, in)`` at most."""
        return factors_of(self.coefficients[index], self)

    def columns(self) -> Tensor:
        """Return the basis, and the mean if there is one, side by side: ``[out * in, k + 1]`` in float64."""
        parts = [self.basis.flatten(1)] + ([] if self.mean is None else [self.mean.flatten()[None]])
        return torch.cat(parts).t().double()

    def in_columns(self) -> Tensor:
        """Return the tasks by these columns, ``[t, k + 1]`` in float64."""
        own = self.coefficients.double()
        return own if self.mean is None else torch.cat([own, own.new_ones(len(own), 1)], dim=1)

    def with_projected(self, adapter: LowRank, config: ShareConfig) -> DeltaBasis:
        """Return the same basis with one more task, projected onto it."""
        flat = _flat([adapter])
        centred = flat if self.mean is None else flat - self.mean.flatten().double()
        own = torch.linalg.lstsq(self.basis.flatten(1).t().double(), centred.t()).solution.t().float()
        size = flat.norm(dim=1)
        added = DeltaBasis(self.basis, own, tuple(size.tolist()), (), self.mean)
        return DeltaBasis(
            self.basis,
            torch.cat([self.coefficients, own]),
            (*self.norms, *size.tolist()),
            (*self.errors, *_measured(added, flat, size).tolist()),
            self.mean,
        )


def factors_of(coefficients: Tensor, basis: DeltaBasis) -> LowRank:
    """Return ``mean + sum_j coefficients[j] basis[j]`` as balanced factors, without what float32 cannot hold."""
    delta = torch.tensordot(coefficients.double(), basis.basis.double(), dims=1)
    delta = delta if basis.mean is None else delta + basis.mean.double()
    u, singular, vh = torch.linalg.svd(delta, full_matrices=False)
    rank = max(1, int((singular > RANK_TOLERANCE * singular[0]).sum()))
    root = singular[:rank].sqrt()
    return LowRank((root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float())


def fit_delta(
    past: DeltaBasis | None, new: Sequence[LowRank], config: ShareConfig, names: Sequence[str]
) -> DeltaBasis:
    """Merge new adapters of a layer; see :func:`~varshare_rl.transfer.share.fit.fit`.

    All tasks are points in the span of the old basis, its mean and the new corrections, whose dimension does not
    grow with the number of tasks; the decomposition is that of their coordinates there.
    """
    rows = _flat(new)
    norms = sizes = rows.norm(dim=1)
    before = torch.zeros(len(new), dtype=torch.float64)
    span = rows.t() if past is None else torch.cat([past.columns(), rows.t()], dim=1)
    q, triangle = torch.linalg.qr(span)
    points = triangle[:, -len(new) :].t()
    if past is not None:
        points = torch.cat([past.in_columns() @ triangle[:, : -len(new)].t(), points])
        norms = torch.cat([torch.tensor(past.norms, dtype=torch.float64), norms])
        before = torch.cat([torch.tensor(past.errors, dtype=torch.float64), before])
    centre = points.mean(0) if config.centred else torch.zeros_like(points[0])
    _, spectrum, vh = torch.linalg.svd(points - centre, full_matrices=False)
    kept = max(1, int((spectrum > 1e-14 * spectrum[0]).sum()))
    directions, spectrum = vh[:kept].t(), spectrum[:kept]
    coordinates = (points - centre) @ directions
    missed = ((points - centre).square().sum(1, keepdim=True) - coordinates.square().cumsum(1)).clamp_min(0.0)

    def errors_at(k: int) -> Tensor:
        return before + relative(missed[:, k - 1].sqrt(), norms)

    k = choose_k(config.size(), (spectrum,), errors_at, before, names)
    shape = (new[0].out_features, new[0].in_features)
    made = DeltaBasis(
        (q @ directions[:, :k]).t().float().reshape(k, *shape).contiguous(),
        coordinates[:, :k].float().contiguous(),
        tuple(norms.tolist()),
        (),
        (q @ centre).float().reshape(shape) if config.centred else None,
    )
    own = replace(made, coefficients=made.coefficients[-len(new) :], norms=tuple(sizes.tolist()))
    errors = _measured(own, rows, sizes)
    check_kept(errors, config.size(), names[-len(new) :])
    if past is not None:
        old = replace(made, coefficients=made.coefficients[: -len(new)], norms=past.norms)
        exact = (before[: -len(new)] - _rounding(past)).clamp_min(0.0)
        errors = torch.cat([exact + _moved(past, old) + _rounding(old), errors])
    return replace(made, errors=tuple(errors.tolist()))


def _measured(basis: DeltaBasis, rows: Tensor, sizes: Tensor) -> Tensor:
    """Return bounds on the relative errors of what is rebuilt for corrections ``[n, out * in]``."""
    made = basis.in_columns() @ basis.columns().t()
    return relative((made - rows).norm(dim=1), sizes) + _rounding(basis)


def _moved(before: DeltaBasis, after: DeltaBasis) -> Tensor:
    """Return how far the same tasks are from where they were, relative to their originals."""
    triangle = torch.linalg.qr(torch.cat([before.columns(), after.columns()], dim=1), mode="r").R
    points = torch.cat([before.in_columns(), -after.in_columns()], dim=1)
    return relative((points @ triangle.t()).norm(dim=1), torch.tensor(before.norms, dtype=torch.float64))


def _rounding(basis: DeltaBasis) -> Tensor:
    """Return bounds on the relative error of factors that are cut at ``RANK_TOLERANCE`` and rounded to float32."""
    sizes = (basis.in_columns() @ torch.linalg.qr(basis.columns(), mode="r").R.t()).norm(dim=1)
    part = (FACTOR_ROUNDING + RANK_TOLERANCE) * float(min(basis.features)) ** 0.5
    return relative(part * sizes, torch.tensor(basis.norms, dtype=torch.float64))


def _flat(adapters: Sequence[LowRank]) -> Tensor:
    return torch.stack(
        [(adapter.scale * (adapter.b.double() @ adapter.a.double())).flatten() for adapter in adapters]
    )
