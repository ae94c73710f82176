"""Copies: a network of its own for every task, so that nothing is forgotten and everything is stored."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from torch import Tensor, nn

from varshare_rl.registry import register
from varshare_rl.transfer.bases import OwnParameters
from varshare_rl.transfer.method import (
    ContinualMethodConfig,
    NetworkSpec,
    Pretrained,
    StorageCost,
    state_bytes,
    state_copy,
)
from varshare_rl.transfer.pretrained import pretrained_storage


class Start(Enum):
    """Start of a task's network."""

    previous = "previous"  # the network of the task before it
    base = "base"  # the pretrained agent's base; without one the weights that the first task started from
    scratch = "scratch"  # fresh weights


@register("method", "copies")
@dataclass
class CopiesConfig(ContinualMethodConfig):
    """``method=copies``."""

    keeps_parameters: ClassVar[bool] = True
    name: str = "copies"
    start: Start = Start.previous
    "Start of a task's network: that of the task before it, the base, or fresh weights."

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> Copies:
        """Make the method."""
        return Copies(self, spec, pretrained)


class Copies(OwnParameters):
    """One saved network per task: the upper bound on what is kept, and on the bytes that it takes.

    With ``start=scratch`` it is single-task learning, which forward transfer is measured against; with ``previous``
    it is fine-tuning that keeps every task's end.
    """

    state_fields = ("copies=own", "initial")

    def __init__(self, config: CopiesConfig, spec: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, spec, pretrained)
        keeps = config.start is Start.base and pretrained is None
        self.initial = state_copy(spec.plain()) if keeps else None  # to start later tasks from as well

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """Make a network with the weights of ``start``; the first task of all has no previous one but the base."""
        start = self.config.start
        if start is Start.scratch:
            return self.spec.plain()
        network = self.base_network()
        if start is Start.previous and self.tasks:
            network.load_state_dict(self.policy(self.tasks - 1).state_dict())
        elif self.initial is not None:
            network.load_state_dict(self.initial)
        return network

    def starts_from(self, similar: int | None = None) -> int | None:
        """Return the last task with ``start=previous``."""
        return self.tasks - 1 if self.config.start is Start.previous and self.tasks else None

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Save the network."""
        self.keep(state_copy(network))

    def own_network(self, number: int) -> nn.Module:
        """Make the task's copy."""
        return self.spec.plain(self.own[number])

    def stored(self) -> StorageCost:
        """Return the bytes of a network per task; the weights to start from are memory."""
        memory = 0 if self.initial is None else state_bytes(self.initial)
        return pretrained_storage(self.pretrained) + StorageCost(tasks=state_bytes(*self.own), memory=memory)
