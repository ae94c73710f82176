"""Copies: a network of its own for every task, so that nothing is forgotten and everything is stored."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from torch import Tensor, nn

from varshare_rl.registry import register
from varshare_rl.transfer.method import (
    ContinualMethod,
    ContinualMethodConfig,
    NetworkSpec,
    Pretrained,
    StorageCost,
    frozen_eval,
    state_copy,
    tensor_bytes,
)
from varshare_rl.transfer.pretrained import pretrained_policy, pretrained_storage
from varshare_rl.types import Tree


class Start(Enum):
    """What a task's network starts from."""

    previous = "previous"  # the network of the task before it
    base = "base"  # the pretrained agent's base; without a pretrained agent the weights that the first task started from
    scratch = "scratch"  # fresh weights


@register("method", "copies")
@dataclass
class CopiesConfig(ContinualMethodConfig):
    """``method=copies``."""

    keeps_parameters: ClassVar[bool] = True
    name: str = "copies"
    start: Start = Start.previous
    "What a task's network starts from: that of the task before it, the base, or fresh weights."

    def build(self, shape: NetworkSpec, pretrained: Pretrained | None = None) -> Copies:
        """The method."""
        return Copies(self, shape, pretrained)


class Copies(ContinualMethod):
    """One saved network per task: the upper bound on what is kept, and on the bytes that it takes.

    With ``start=scratch`` it is single-task learning, which forward transfer is measured against; with ``previous``
    it is fine-tuning that keeps every task's end.
    """

    def __init__(self, config: CopiesConfig, shape: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, shape, pretrained)
        self.copies: list[dict[str, Tensor]] = []
        keeps = config.start is Start.base and pretrained is None
        self.initial = state_copy(shape.plain()) if keeps else None  # to start later tasks from as well

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """A network with the weights of ``start``; the first task of all has no previous one but the base."""
        start = self.config.start
        if start is Start.scratch:
            return self.shape.plain()
        network = self.base_network()
        if start is Start.previous and self.tasks:
            network.load_state_dict(self.policy(self.tasks - 1).state_dict())
        elif self.initial is not None:
            network.load_state_dict(self.initial)
        return network

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Save the network."""
        self.copies = [*self.copies, state_copy(network)]
        self.tasks += 1

    def policy(self, task: int) -> nn.Module:
        """The task's own network."""
        self.check_learnt(task)
        if self.pretrained is not None and task < self.old_tasks:
            return pretrained_policy(self.shape, self.pretrained, task)
        network = self.shape.plain()
        network.load_state_dict(self.copies[task - self.old_tasks])
        return frozen_eval(network)

    def stored(self) -> StorageCost:
        """A network per task; the weights to start from are memory."""
        old = pretrained_storage(self.pretrained)
        copies = sum(tensor_bytes(*copy.values()) for copy in self.copies)
        memory = 0 if self.initial is None else tensor_bytes(*self.initial.values())
        return StorageCost(old.shared, old.tasks + copies, memory)

    def state(self) -> Tree:
        """The networks."""
        return {"tasks": self.tasks, "copies": self.copies, "initial": self.initial}

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.tasks, self.copies, self.initial = state["tasks"], state["copies"], state["initial"]
