"""LoRA per task on a frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter, AdapterInit, adapter_scale, fresh_adapter, principal_factors
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.config import check_layers, chosen_layers
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.registry import register
from varshare_rl.transfer.bases import LowRankMethod
from varshare_rl.transfer.low_rank import adapter_bytes, linear_layers, mean_of
from varshare_rl.transfer.method import ContinualMethodConfig, NetworkSpec, Pretrained, StorageCost


class AdapterStart(Enum):
    """Start of a new task's adapter."""

    fresh = "fresh"  # b = 0: the base
    mean = "mean"  # the mean of the earlier tasks' corrections, truncated to the rank
    similar = "similar"  # the adapter of the most similar earlier task; fresh without one


@register("method", "lora")
@dataclass
class LoRAMethodConfig(ContinualMethodConfig):
    """``method=lora``."""

    low_rank: ClassVar[bool] = True
    name: str = "lora"
    rank: int = bounded(8, least=1)
    "Rank of the adapters."
    alpha: float | None = bounded(None, above=0)
    "Numerator of the adapters' scale; null: the rank."
    lr_scale: float = bounded(1.0, above=0)
    "Factor on the policy's learning rate once the base is frozen."
    rslora: bool = False
    "Scale `alpha / sqrt(rank)` (Kalajdzievski 2023) instead of `alpha / rank`."
    dropout: float = bounded(0.0, least=0, below=1)
    "Dropout on the adapters' input, in training."
    layers: Any = "all"
    "Layers with adapters: `all`, `last`, or a list of names (`[layers.0]`)."
    init: AdapterInit = AdapterInit.kaiming
    (
        "Start of a fresh adapter: `B = 0` and `A` uniform on +-1 / sqrt(in) or Gaussian of 1 / rank; or a part of "
        "the base weight, which is subtracted from it (`pissa`, `olora`; what is kept then has twice the rank)."
    )
    start: AdapterStart = AdapterStart.fresh
    "Start of a task's adapter: nothing, the mean of the earlier ones, or the one whose policy does best on it."

    def check(self, prefix: str) -> None:
        """Raise UserError for a choice of layers that is none, or for two starts at once."""
        check_layers(self.layers, prefix)
        if self.init.principal and self.start is not AdapterStart.fresh:
            raise UserError(
                f"{prefix}init={self.init.value} starts from the base, {prefix}start={self.start.value} from "
                f"earlier adapters; choose {prefix}start=fresh or another init"
            )

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> LoRAMethod:
        """Make the method."""
        return LoRAMethod(self, spec, pretrained)


class LoRAMethod(LowRankMethod):
    """``W_i = theta + scale * b_i a_i`` with a frozen ``theta`` (Hu et al. 2021): nothing is ever forgotten.

    Nothing of the base changes, so an old task's policy never does by a bit. There are no biases per task: an
    adapter is what other programs read as one, and a constant can be had from the hidden units.

    Raises:
        UserError: the network has no layer of a name in ``layers``.
    """

    def __init__(self, config: LoRAMethodConfig, spec: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, spec, pretrained)
        with torch.random.fork_rng(devices=[]):
            layers = linear_layers(spec.plain())
        chosen_layers(list(layers), config.layers, "method.layers")  # refuses a wrong name before the first task

    def corrected(self, similar: int | None) -> nn.Module:
        """Make the base with an adapter that starts as ``start`` says."""
        if self.config.init.principal:
            return self.base.corrected(self.principal(), self.config.dropout, subtract=True)
        adapter, start = self.fresh_adapter(), self.config.start
        if start is AdapterStart.mean:
            adapter = mean_of(self.adapters, adapter)
        elif start is AdapterStart.similar and similar is not None:
            adapter = mean_of([self.adapters[similar]], adapter)
        return self.base.corrected(adapter, self.config.dropout)

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the correction, or the base."""
        principal = self.config.init.principal and self.base.weights is not None
        super().end(network, inputs)
        if principal:
            start = self.principal()
            self.adapters[-1] = {path: part.minus(start[path]) for path, part in self.adapters[-1].items()}

    def chosen_layers(self) -> dict[str, SharedLayer]:
        """Return the layers of the base that get adapters, by path."""
        layers = self.base.layers()
        return {path: layers[path] for path in chosen_layers(list(layers), self.config.layers, "method.layers")}

    def fresh_adapter(self) -> Adapter:
        """Make an adapter of the chosen layers that corrects nothing yet."""
        return fresh_adapter(self.chosen_layers(), self.config.rank, self.scale, self.config.init)

    def principal(self) -> Adapter:
        """Return the parts of the base weights that an adapter starts from, of no higher rank than these have."""
        return {
            path: principal_factors(
                layer.theta, min(self.config.rank, *layer.theta.shape), self.scale, self.config.init
            )
            for path, layer in self.chosen_layers().items()
        }

    @property
    def scale(self) -> float:
        """Factor on ``b a``."""
        return adapter_scale(self.config.alpha, self.config.rank, self.config.rslora)

    def stored(self) -> StorageCost:
        """Return the bytes of the base and the adapters."""
        return StorageCost(self.base.bytes(), sum(adapter_bytes(adapter) for adapter in self.adapters))
