"""The layers with a Gaussian residual per task, and what work on their posteriors needs of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from varshare_rl.nn.varshare import VarShareLayer
from varshare_rl.nn.varshare_lora import VarShareLoRALayer

PosteriorLayer = VarShareLoRALayer | VarShareLayer


def posterior_layers(module: nn.Module) -> Iterator[tuple[str, PosteriorLayer]]:
    """All layers with a residual per task inside ``module`` with their dotted names, in order."""
    for name, child in module.named_modules():
        if isinstance(child, VarShareLoRALayer | VarShareLayer):
            yield name, child
