"""LoRA per task on a frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from torch import nn

from varshare_rl.adapters.adapter import Adapter, FreshInit, adapter_scale, fresh_adapter
from varshare_rl.fields import bounded
from varshare_rl.nn.config import check_layers, chosen_layers
from varshare_rl.registry import register
from varshare_rl.transfer.bases import LowRankMethod
from varshare_rl.transfer.low_rank import adapter_bytes, mean_of
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
    rslora: bool = False
    "Scale `alpha / sqrt(rank)` (Kalajdzievski 2023) instead of `alpha / rank`."
    dropout: float = bounded(0.0, least=0, below=1)
    "Dropout on the adapters' input, in training."
    layers: Any = "all"
    "Layers with adapters: `all`, `last`, or a list of names (`[layers.0]`)."
    init: FreshInit = FreshInit.kaiming
    "Start of `A` of a fresh adapter, `B` is 0: uniform on +-1 / sqrt(in), or Gaussian of 1 / rank."
    start: AdapterStart = AdapterStart.fresh
    "Start of a task's adapter: nothing, the mean of the earlier ones, or the one whose policy does best on it."

    def check(self, prefix: str) -> None:
        """Raise UserError for a choice of layers that is none."""
        check_layers(self.layers, prefix)

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> LoRAMethod:
        """Make the method."""
        return LoRAMethod(self, spec, pretrained)


class LoRAMethod(LowRankMethod):
    """``W_i = theta + scale * b_i a_i`` with a frozen ``theta`` (Hu et al. 2021): nothing is ever forgotten.

    Nothing of the base changes, so an old task's policy never does by a bit. There are no biases per task: an
    adapter is what other programs read as one, and a constant can be had from the hidden units.
    """

    def corrected(self, similar: int | None) -> nn.Module:
        """Make the base with an adapter that starts as ``start`` says."""
        adapter, start = self.fresh_adapter(), self.config.start
        if start is AdapterStart.mean:
            adapter = mean_of(self.adapters, adapter)
        elif start is AdapterStart.similar and similar is not None:
            adapter = mean_of([self.adapters[similar]], adapter)
        return self.base.corrected(adapter, self.config.dropout)

    def fresh_adapter(self) -> Adapter:
        """Make an adapter of the chosen layers that corrects nothing yet."""
        config, layers = self.config, self.base.layers()
        chosen = chosen_layers(list(layers), config.layers)
        scale = adapter_scale(config.alpha, config.rank, config.rslora)
        return fresh_adapter({path: layers[path] for path in chosen}, config.rank, scale, config.init)

    def stored(self) -> StorageCost:
        """Return the bytes of the base and the adapters."""
        return StorageCost(self.base.bytes(), sum(adapter_bytes(adapter) for adapter in self.adapters))
