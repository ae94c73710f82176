"""Pruning: residuals whose posterior says no more than the prior are set to the prior.

What is kept or pruned as one is a *unit*. By nats (the default) it is, per task, component ``k`` of a low-rank
residual (column ``k`` of ``B`` with row ``k`` of ``A``: one without the other does nothing) or the whole residual
of a full-rank layer, and its measure is the mean KL divergence of its Gaussians,

    KL(q || p) / n        q: the unit's n Gaussians        in nats per Gaussian

which is 0 exactly at the prior. By signal-to-noise (Graves 2011; Blundell et al. 2015, section 5.1) the measure is
how large the mean is beside the standard deviation: ``|mu| / sigma`` of each weight of a full-rank residual, and
for a low-rank component that of the product, since what acts on the output is ``B A`` and not its factors:

    |mu_b| |mu_a| / sqrt(|mu_b|^2 |sigma_a|^2 + |sigma_b|^2 |mu_a|^2 + |sigma_b|^2 |sigma_a|^2)

(root mean square of the mean over that of the deviation, for a column ``b`` and a row ``a``).

A pruned unit's means become 0 and its sigmas those of the prior, so it costs 0 nats and need not be stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from varshare_rl.nn.layer import TaskLayer, task_layers


class Criterion(Enum):
    """Measure that decides about a unit."""

    nats = "nats"  # divergence from the prior per Gaussian
    snr = "snr"  # size of the mean beside the standard deviation


@dataclass(frozen=True)
class Pruned:
    """Outcome of pruning one layer.

    Attributes:
        kept: bool, ``[T, rank]`` for a low-rank layer, ``[T]`` or (by signal-to-noise) ``[T, G, F]`` for a
            full-rank one.
        gaussians: Gaussians of one unit.
        nats_before, nats_after: divergence of each task's posterior, ``[T]``.
        change: change of each task's mean weight, relative to that weight (Frobenius norms), ``[T]``.
    """

    kept: Tensor
    gaussians: int
    nats_before: Tensor
    nats_after: Tensor
    change: Tensor

    @property
    def kept_bytes(self) -> int:
        """Bytes of the kept units (mean and sigma in float32) and of one bit a unit that says which they are."""
        return int(self.kept.sum()) * self.gaussians * 8 + -(-self.kept.numel() // 8)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all units."""
        return self.kept.numel() * self.gaussians * 8


@torch.no_grad()
def prune(module: nn.Module, threshold: float, criterion: Criterion = Criterion.nats) -> dict[str, Pruned]:
    """Set every unit whose measure is below ``threshold`` to its prior, in place; returns what, by layer name.

    Raises:
        ValueError: ``threshold`` is negative or not a number.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; it must be at least 0")
    layers = dict(task_layers(module))
    measures = {
        name: layer.unit_nats() if criterion is Criterion.nats else layer.unit_snr()
        for name, layer in layers.items()
    }
    return {
        name: _prune_layer(layers[name], measure, threshold)
        for name, measure in measures.items()
        if measure is not None
    }


def _prune_layer(layer: TaskLayer, measure: Tensor, threshold: float) -> Pruned:
    kept = measure >= threshold
    before, nats_before = deepcopy(layer), layer.kl().detach()
    layer.set_to_prior(kept)
    gaussians = sum(layer.get_parameter(name).numel() for name in layer.rho_parameters) // kept.numel()
    return Pruned(kept, gaussians, nats_before, layer.kl().detach(), _relative_change(layer, before))


def _relative_change(layer: TaskLayer, before: TaskLayer) -> Tensor:
    """``|W_i after - W_i before| / |W_i before|`` of the mean weights, task by task, ``[T]``."""
    changes = []
    for task in range(layer.num_tasks):
        old = before.residual(task)
        changes.append((layer.residual(task) - old).norm() / (layer.theta + old).norm().clamp_min(1e-12))
    return torch.stack(changes).detach()


def report(layers: Mapping[str, Pruned]) -> dict[str, object]:
    """Units pruned in all ``layers`` together and in each, with the bytes of the posteriors before and after."""
    units, kept = (sum(int(count) for count in counts) for counts in _counts(layers))
    dense = sum(layer.dense_bytes for layer in layers.values())
    left = sum(layer.kept_bytes for layer in layers.values())
    rows = {
        name: {
            "units": layer.kept.numel(),
            "kept": int(layer.kept.sum()),
            "kept_per_task": layer.kept.flatten(1).sum(1).tolist()
            if layer.kept.dim() > 1
            else layer.kept.int().tolist(),
            "nats_before": layer.nats_before.tolist(),
            "nats_after": layer.nats_after.tolist(),
            "weight_change": layer.change.tolist(),
        }
        for name, layer in layers.items()
    }
    ratio = dense / left if left else math.inf
    return {
        "units": units,
        "kept": kept,
        "bytes_dense": dense,
        "bytes_kept": left,
        "compression": ratio,
        "layers": rows,
    }


def _counts(layers: Mapping[str, Pruned]) -> tuple[list[int], list[int]]:
    return [layer.kept.numel() for layer in layers.values()], [int(layer.kept.sum()) for layer in layers.values()]
