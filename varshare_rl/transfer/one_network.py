"""What methods have in common that keep one network for all tasks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from varshare_rl.transfer.method import (
    ContinualMethod,
    NetworkSpec,
    Pretrained,
    StorageCost,
    frozen_eval,
    state_copy,
    tensor_bytes,
)
from varshare_rl.types import Tree


class OneNetwork(ContinualMethod):
    """One network, trained on each task in turn, that acts in all of them."""

    task_free = True

    def __init__(self, config: Any, shape: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, shape, pretrained)
        self.weights = state_copy(self.base_network())

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """The network as the last task has left it."""
        return self._network()

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the weights."""
        self.weights = state_copy(network)
        self.tasks += 1

    def policy(self, task: int) -> nn.Module:
        """The one network."""
        self.check_learnt(task)
        return frozen_eval(self._network())

    def stored(self) -> StorageCost:
        """One network."""
        return StorageCost(shared=tensor_bytes(*self.weights.values()), tasks=0)

    def state(self) -> Tree:
        """The weights."""
        return {"tasks": self.tasks, "weights": self.weights}

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.tasks, self.weights = state["tasks"], state["weights"]

    def _network(self) -> nn.Module:
        network = self.shape.plain()
        network.load_state_dict(self.weights)
        return network
