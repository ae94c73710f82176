"""LoRA per task on a frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import nn

from varshare_rl.transfer.bases import LowRankMethod
from varshare_rl.transfer.low_rank import adapter_bytes, mean_of
from varshare_rl.transfer.method import ContinualMethodConfig, StorageCost


class AdapterStart(Enum):
    """Start of a new task's adapter."""

    fresh = "fresh"  # b = 0: the base
    mean = "mean"  # the mean of the earlier tasks' corrections, truncated to the rank
    similar = "similar"  # the adapter of the most similar earlier task; fresh without one


@dataclass
class LoRAMethodConfig(ContinualMethodConfig):
    """``method=lora``.

    Attributes:
        rank: of the adapters; alpha: numerator of their scale, ``rank`` unless given, which makes it 1.
        rslora: scale ``alpha / sqrt(rank)`` (Kalajdzievski 2023) instead of ``alpha / rank``.
        start: see :class:`AdapterStart`.
    """

    name: str = "lora"
    rank: int = 8
    alpha: float | None = None
    rslora: bool = False
    start: AdapterStart = AdapterStart.fresh


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
        return self.base.corrected(adapter)

    def stored(self) -> StorageCost:
        """Return the bytes of the base and the adapters."""
        return StorageCost(self.base.bytes(), sum(adapter_bytes(adapter) for adapter in self.adapters))
