"""Shared-private: a frozen encoder for all tasks, and a head of its own for each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from varshare_rl.continual.head import head_path, split_head
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
from varshare_rl.continual.origin import origin_policy, origin_stored
from varshare_rl.types import Tree


@dataclass
class SharedPrivateOptions(MethodOptions):
    """``method=shared_private``."""

    name: str = "shared_private"


class SharedPrivate(Method):
    """All layers but the last, LayerNorms among them, are learnt on the first task and frozen from then on.

    Every task learns a fresh last layer. With an origin the encoder is that of its base and never learns.

    Raises:
        UserError: the network has no hidden layer.
    """

    def __init__(self, options: SharedPrivateOptions, shape: Shape, origin: Origin | None = None) -> None:
        super().__init__(options, shape, origin)
        network = self.base_network()
        self.head = head_path(network, options.name)
        self.encoder = split_head(state_copy(network), self.head)[0]
        self.heads: list[dict[str, Tensor]] = []

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """The encoder under a fresh head; only the head is trained once the encoder is fixed."""
        network = self.shape.plain()
        network.load_state_dict({**network.state_dict(), **self.encoder})
        if self._is_fixed():
            network.requires_grad_(False)
            network.get_submodule(self.head).requires_grad_(True)
        return network

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the head, and the first task's encoder."""
        encoder, head = split_head(state_copy(network), self.head)
        if not self._is_fixed():
            self.encoder = encoder
        self.heads = [*self.heads, head]
        self.tasks += 1

    def policy(self, task: int) -> nn.Module:
        """The encoder under the task's head."""
        self.check_learnt(task)
        if self.origin is not None and task < self.old_tasks:
            return origin_policy(self.shape, self.origin, task)
        network = self.shape.plain()
        network.load_state_dict({**self.encoder, **self.heads[task - self.old_tasks]})
        return settled(network)

    def stored(self) -> Stored:
        """One encoder and the heads; the base that an origin's tasks need has the encoder in it."""
        old = origin_stored(self.origin)
        heads = sum(tensor_bytes(*head.values()) for head in self.heads)
        return Stored(old.shared or tensor_bytes(*self.encoder.values()), old.tasks + heads)

    def state(self) -> Tree:
        """Encoder and heads."""
        return {"tasks": self.tasks, "encoder": self.encoder, "heads": self.heads}

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.tasks, self.encoder, self.heads = state["tasks"], state["encoder"], state["heads"]

    def _is_fixed(self) -> bool:
        return self.origin is not None or bool(self.heads)
