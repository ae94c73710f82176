"""``method: delta``: a layer's basis is made of whole corrections, its coefficients are ``k`` numbers per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varshare_rl.adapters.adapter import LowRank
from varshare_rl.transfer.share.config import ShareConfig
from varshare_rl.transfer.share.factors import compress, left_singular, orthonormal, relative
from varshare_rl.transfer.share.fit import choose_k

#: Singular values below this part of the largest are left out of rebuilt factors: float32 has no more.
RANK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class DeltaBasis:
    """``dW_i = sum_j coefficients[i, j] basis[j]``.

    The top ``k`` right singular vectors of the tasks' flattened corrections ``[t, out * in]``. It is the best basis
    of its kind, and a large one: ``k * out * in`` numbers.

    Attributes:
        basis: ``[k, out, in]``, orthonormal; coefficients: ``[t, k]``; norms, errors: as in
            :class:`~varshare_rl.transfer.share.layer_basis.LayerBasis`.
    """

    basis: Tensor
    coefficients: Tensor
    norms: tuple[float, ...]
    errors: tuple[float, ...]

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
        return self.basis.numel()

    def task_numbers(self, index: int) -> int:
        """Count the numbers of one task."""
        return self.coefficients.shape[1]

    def trained_numbers(self) -> int:
        """Count the coefficients of a new task."""
        return self.k

    def rebuild(self, index: int) -> LowRank:
        """Return one task's correction as factors, of whatever rank it has, ``min(out, in)`` at most."""
        return factors_of(self.coefficients[index], self.basis)

    def with_projected(self, adapter: LowRank, config: ShareConfig) -> DeltaBasis:
        """Return the same basis with one more task, projected onto it."""
        flat = _flat([adapter])
        size = flat.norm(dim=1)
        exact, fix = orthonormal(self.basis.flatten(1).t())
        own = flat @ exact
        error = relative((size.square() - own.square().sum(1)).clamp_min(0.0).sqrt(), size)
        return DeltaBasis(
            self.basis,
            torch.cat([self.coefficients, torch.linalg.solve(fix, own.t()).t().float()]),
            (*self.norms, *size.tolist()),
            (*self.errors, *error.tolist()),
        )


def factors_of(coefficients: Tensor, basis: Tensor) -> LowRank:
    """Return ``sum_j coefficients[j] basis[j]`` as balanced factors, without what float32 cannot tell from 0."""
    delta = torch.tensordot(coefficients.double(), basis.double(), dims=1)
    u, singular, vh = torch.linalg.svd(delta, full_matrices=False)
    rank = max(1, int((singular > RANK_TOLERANCE * singular[0]).sum()))
    root = singular[:rank].sqrt()
    return LowRank((root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float())


def fit_delta(
    past: DeltaBasis | None, new: Sequence[LowRank], config: ShareConfig, names: Sequence[str]
) -> DeltaBasis:
    """Merge new adapters of a layer; see :func:`~varshare_rl.transfer.share.fit.fit`."""
    rows = _flat(new)
    sizes = norms = rows.norm(dim=1)
    before = torch.zeros(len(new), dtype=torch.float64)
    stacked = rows
    if past is not None:
        exact, fix = orthonormal(past.basis.flatten(1).t())
        held, old_basis = past.coefficients.double() @ fix.t(), exact.t()
        stacked = torch.cat([compress(held.t()).t() @ old_basis, rows])  # at most k rows for all earlier tasks
        norms = torch.cat([torch.tensor(past.norms, dtype=torch.float64), norms])
        before = torch.cat([torch.tensor(past.errors, dtype=torch.float64), before])
    directions, spectrum = left_singular(stacked.t())
    coefficients = rows @ directions
    if past is not None:
        coefficients = torch.cat([held @ (old_basis @ directions), coefficients])
        sizes = torch.cat([held.norm(dim=1), sizes])
    missed = (sizes.square().unsqueeze(1) - coefficients.square().cumsum(1)).clamp_min(0.0).sqrt()

    def errors_at(k: int) -> Tensor:
        return before + relative(missed[:, k - 1], norms)

    k = choose_k(config.size(), (spectrum,), errors_at, before, names)
    basis = directions[:, :k].t().float().reshape(k, new[0].out_features, new[0].in_features)
    kept = coefficients[:, :k].float()
    return DeltaBasis(basis.contiguous(), kept.contiguous(), tuple(norms.tolist()), tuple(errors_at(k).tolist()))


def _flat(adapters: Sequence[LowRank]) -> Tensor:
    return torch.stack(
        [(adapter.scale * (adapter.b.double() @ adapter.a.double())).flatten() for adapter in adapters]
    )
