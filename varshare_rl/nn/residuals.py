"""The layers with a Gaussian residual per task, and what work on their posteriors needs of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from varshare_rl.nn.varshare import VarShareLayer
from varshare_rl.nn.varshare_lora import VarShareLoRALayer

ResidualLayer = VarShareLoRALayer | VarShareLayer


def residual_layers(module: nn.Module) -> Iterator[tuple[str, ResidualLayer]]:
    """All layers with a residual per task inside ``module`` with their dotted names, in order."""
    for name, child in module.named_modules():
        if isinstance(child, VarShareLoRALayer | VarShareLayer):
            yield name, child


def prior_scales(layer: ResidualLayer) -> Tensor:
    """Standard deviation of each task's prior, ``[T]``, detached."""
    scale = torch.as_tensor(layer.prior_scale, dtype=layer.theta.dtype, device=layer.theta.device)
    return scale.detach().expand(layer.num_tasks)


def mean_residuals(layer: ResidualLayer) -> Tensor:
    """Mean residuals built in full, ``[T, G, F]``: for reports, not for training."""
    if isinstance(layer, VarShareLayer):
        return layer.mus
    return layer.scale * (layer.mus_B @ layer.mus_A)
