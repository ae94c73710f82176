"""Pruning: residuals whose posterior says no more than the prior are set to the prior.

What is kept or pruned as one is a *unit*. By nats (the default) it is, per task, component ``k`` of a low-rank
residual (column ``k`` of ``B`` with row ``k`` of ``A``: one without the other does nothing) or the whole residual
of a full-rank layer, and its measure is the mean KL divergence of its Gaussians,

    KL(q || p) / n        q: the unit's n Gaussians        in nats per Gaussian

which is 0 exactly at the prior. By signal-to-noise (Graves 2011; Blundell et al. 2015, section 5.1) the measure is
how large the mean is beside the spread: ``|mu| / sigma`` of each weight of a full-rank residual, and for a
low-rank component that of the product, since what acts on the output is ``B A`` and not its factors:

    |mu_b| |mu_a| / sqrt(|mu_b|^2 |sigma_a|^2 + |sigma_b|^2 |mu_a|^2 + |sigma_b|^2 |sigma_a|^2)

(root mean square of the mean over that of the deviation, for a column ``b`` and a row ``a``).

A pruned unit's means become 0 and its spreads those of the prior, so it costs 0 nats and need not be stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from varshare_rl.nn.posteriors import PosteriorLayer, posterior_layers
from varshare_rl.nn.varshare import VarShareLayer
from varshare_rl.nn.varshare_lora import VarShareLoRALayer
from varshare_rl.ops.gaussian import softplus_sigma


class Criterion(Enum):
    """What decides whether a unit is kept."""

    nats = "nats"  # divergence from the prior per Gaussian
    snr = "snr"  # size of the mean beside the spread


@dataclass(frozen=True)
class Pruned:
    """What was pruned of a layer.

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
        """Bytes of the kept units (mean and spread in float32) and of one bit a unit that says which they are."""
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
    return {name: _prune_layer(layer, threshold, criterion) for name, layer in posterior_layers(module)}


def _prune_layer(layer: PosteriorLayer, threshold: float, criterion: Criterion) -> Pruned:
    measure = unit_nats(layer) if criterion is Criterion.nats else unit_snr(layer)
    kept = measure >= threshold
    before, means = layer.kl().detach(), _copies(layer)
    _set_to_prior(layer, kept)
    total = sum(layer.get_parameter(name).numel() for name in layer.rho_parameters)
    return Pruned(kept, total // kept.numel(), before, layer.kl().detach(), _relative_change(layer, means))


def unit_nats(layer: PosteriorLayer) -> Tensor:
    """Nats per Gaussian of each unit: ``[T, rank]`` for a low-rank layer, ``[T]`` for a full-rank one."""
    prior = layer.prior_scale
    if isinstance(layer, VarShareLayer):
        return _nats(layer.mus, layer.rhos, prior).flatten(1).mean(1)
    rows = _nats(layer.mus_A, layer.rhos_A, prior).sum(2)
    columns = _nats(layer.mus_B, layer.rhos_B, prior).sum(1)
    return (rows + columns) / (layer.in_features + layer.out_features)


def unit_snr(layer: PosteriorLayer) -> Tensor:
    """Signal-to-noise of each unit: ``[T, rank]`` for a low-rank layer, ``[T, G, F]`` for a full-rank one."""
    if isinstance(layer, VarShareLayer):
        return layer.mus.abs() / softplus_sigma(layer.rhos)
    mean_a, mean_b = layer.mus_A.square().sum(2), layer.mus_B.square().sum(1)
    variance_a = softplus_sigma(layer.rhos_A).square().sum(2)
    variance_b = softplus_sigma(layer.rhos_B).square().sum(1)
    noise = mean_b * variance_a + variance_b * mean_a + variance_b * variance_a
    return (mean_a * mean_b / noise).sqrt()


def _nats(mu: Tensor, rho: Tensor, prior: Tensor) -> Tensor:
    """Divergence of each Gaussian from ``N(0, prior^2)``, with one prior per task, ``[T]``."""
    ratio = softplus_sigma(rho) / prior.view(-1, 1, 1)
    # x - log(1 + x) of x = ratio^2 - 1 keeps its digits where the posterior is near the prior.
    excess = ratio.square() - 1.0
    spread = (excess - torch.log1p(excess)).clamp_min(0.0)  # not below 0 by rounding
    return 0.5 * (spread + (mu / prior.view(-1, 1, 1)).square())


def _set_to_prior(layer: PosteriorLayer, kept: Tensor) -> None:
    prior = layer.prior_scale
    rho = torch.log(torch.expm1(prior.double())).to(prior.dtype).view(-1, 1, 1)  # softplus(rho) = prior
    if isinstance(layer, VarShareLayer):
        places = {"mus": kept.view(len(kept), *(kept.shape[1:] or (1, 1)))}
    else:
        places = {"mus_A": kept.unsqueeze(2), "mus_B": kept.unsqueeze(1)}
    for name, keep in places.items():
        mus, rhos = layer.get_parameter(name), layer.get_parameter(name.replace("mus", "rhos"))
        mus.copy_(torch.where(keep, mus, 0.0))
        rhos.copy_(torch.where(keep, rhos, rho))


def _copies(layer: PosteriorLayer) -> dict[str, Tensor]:
    names = [name for name in layer.per_task_parameters if name not in layer.rho_parameters]
    return {name: layer.get_parameter(name).clone() for name in names}


def _relative_change(layer: PosteriorLayer, before: dict[str, Tensor]) -> Tensor:
    """``|W_i after - W_i before| / |W_i before|`` of the mean weights, task by task, ``[T]``."""
    changes = []
    for task in range(layer.num_tasks):
        if isinstance(layer, VarShareLoRALayer):
            old = layer.scale * (before["mus_B"][task] @ before["mus_A"][task])
            new = layer.scale * (layer.mus_B[task] @ layer.mus_A[task])
        else:
            old, new = before["mus"][task], layer.mus[task]
        changes.append((new - old).norm() / (layer.theta + old).norm().clamp_min(1e-12))
    return torch.stack(changes).detach()


def report(layers: Mapping[str, Pruned]) -> dict[str, object]:
    """What was pruned in all ``layers`` together and in each, with the bytes of the posteriors before and after."""
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
