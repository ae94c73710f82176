"""Frozen: what the first task taught is used for all the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from varshare_rl.continual.method import (
    Method,
    MethodOptions,
    Origin,
    Shape,
    Stored,
    settled,
    state_copy,
    tensor_bytes,
)
from varshare_rl.types import Tree


@dataclass
class FrozenOptions(MethodOptions):
    """``method=frozen``."""

    name: str = "frozen"


class Frozen(Method):
    """One network that learns the first task and nothing after it; an origin's base learns nothing at all.

    The lower bound on what a later task must be worth, and the upper bound on remembering. From the second task on
    (the first with an origin) no parameter of the network that :meth:`begin` gives requires a gradient.
    """

    task_free = True

    def __init__(self, options: FrozenOptions, shape: Shape, origin: Origin | None = None) -> None:
        super().__init__(options, shape, origin)
        self.weights = state_copy(self.base_network())

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """The network, to be trained only on the first task."""
        network = self._network()
        return settled(network) if self._is_fixed() else network

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the weights of the first task."""
        if not self._is_fixed():
            self.weights = state_copy(network)
        self.tasks += 1

    def policy(self, task: int) -> nn.Module:
        """The one network."""
        self.check_learnt(task)
        return settled(self._network())

    def stored(self) -> Stored:
        """One network."""
        return Stored(shared=tensor_bytes(*self.weights.values()), tasks=0)

    def state(self) -> Tree:
        """The weights."""
        return {"tasks": self.tasks, "weights": self.weights}

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.tasks, self.weights = state["tasks"], state["weights"]

    def _is_fixed(self) -> bool:
        return self.origin is not None or self.tasks > 0

    def _network(self) -> nn.Module:
        network = self.shape.plain()
        network.load_state_dict(self.weights)
        return network
