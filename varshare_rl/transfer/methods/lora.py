"""LoRA per task on a frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter, adapter_scale
from varshare_rl.fields import bounded
from varshare_rl.nn.initial import check_positive
from varshare_rl.registry import register
from varshare_rl.transfer.low_rank import (
    FrozenBase,
    adapter_bytes,
    adapter_of,
    adapter_state,
    check_learnt,
    fresh_adapter,
    mean_of,
    take_adapter,
)
from varshare_rl.transfer.method import (
    ContinualMethod,
    ContinualMethodConfig,
    NetworkSpec,
    Pretrained,
    StorageCost,
    frozen_eval,
)
from varshare_rl.types import Tree


class AdapterStart(Enum):
    """What the adapter of a new task starts as."""

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
    start: AdapterStart = AdapterStart.fresh
    """What a task's adapter starts as: nothing, the mean of the earlier ones, or that of the task whose policy does
    best."""

    def build(self, shape: NetworkSpec, pretrained: Pretrained | None = None) -> LoRAMethod:
        """The method."""
        return LoRAMethod(self, shape, pretrained)


class LoRAMethod(ContinualMethod):
    """``W_i = theta + scale * b_i a_i`` with a frozen ``theta`` (Hu et al. 2021): nothing is ever forgotten.

    The base is the pretrained agent's, or what the first task learns with all weights, whose adapter is then empty. Weights
    and biases of the base, norms included, stay as they are, so an old task's policy never changes by a bit. There
    are no biases per task: an adapter is what other programs read as one, and a constant can be had from the hidden
    units.
    """

    def __init__(self, config: LoRAMethodConfig, shape: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, shape, pretrained)
        check_positive(rank=config.rank, alpha=1.0 if config.alpha is None else config.alpha)
        self.base = FrozenBase(shape, pretrained)
        self.adapters: list[Adapter] = (
            [] if pretrained is None else [dict(adapter) for adapter in pretrained.adapters]
        )

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """All weights for the first task without a pretrained agent, afterwards an adapter on the frozen base."""
        if self.base.weights is None:
            return self.base_network()
        return self.base.corrected(self._start(similar))

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the adapter, or the base."""
        if self.base.weights is None:
            self.base.keep(network)
        self.adapters.append(take_adapter(network))
        self.tasks += 1

    def policy(self, task: int) -> nn.Module:
        """The base with the task's adapter."""
        check_learnt(task, self.tasks)
        return frozen_eval(self.base.corrected(self.adapters[task]))

    def stored(self) -> StorageCost:
        """The base, and the adapters."""
        return StorageCost(self.base.bytes(), sum(adapter_bytes(adapter) for adapter in self.adapters))

    def state(self) -> Tree:
        """The base unless it is the pretrained agent's, and the adapters that were learnt here."""
        learnt = self.adapters[self.old_tasks :]
        return {"base": self.base.state(), "adapters": [adapter_state(adapter) for adapter in learnt]}

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.base.load_state(state["base"])
        self.adapters[self.old_tasks :] = [adapter_of(adapter) for adapter in state["adapters"]]
        self.tasks = len(self.adapters)

    def _start(self, similar: int | None) -> Adapter:
        config = self.config
        alpha = config.rank if config.alpha is None else config.alpha
        fresh = fresh_adapter(self.base.layers(), config.rank, adapter_scale(alpha, config.rank, config.rslora))
        if config.start is AdapterStart.mean:
            return mean_of(self.adapters, fresh)
        if config.start is AdapterStart.similar and similar is not None:
            check_learnt(similar, self.tasks)
            return mean_of([self.adapters[similar]], fresh)
        return fresh
