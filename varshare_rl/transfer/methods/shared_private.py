"""Shared-private: a frozen encoder for all tasks, and a head of its own for each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from varshare_rl.registry import register
from varshare_rl.transfer.head import head_path, split_head
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


@register("method", "shared_private")
@dataclass
class SharedPrivateConfig(ContinualMethodConfig):
    """``method=shared_private``."""

    name: str = "shared_private"

    def build(self, shape: NetworkSpec, pretrained: Pretrained | None = None) -> SharedPrivate:
        """The method."""
        return SharedPrivate(self, shape, pretrained)


class SharedPrivate(ContinualMethod):
    """All layers but the last, LayerNorms among them, are learnt on the first task and frozen from then on.

    Every task learns a fresh last layer. With a pretrained agent the encoder is that of its base and never learns.

    Raises:
        UserError: the network has no hidden layer.
    """

    def __init__(
        self, config: SharedPrivateConfig, shape: NetworkSpec, pretrained: Pretrained | None = None
    ) -> None:
        super().__init__(config, shape, pretrained)
        network = self.base_network()
        self.head = head_path(network, config.name)
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
        if self.pretrained is not None and task < self.old_tasks:
            return pretrained_policy(self.shape, self.pretrained, task)
        network = self.shape.plain()
        network.load_state_dict({**self.encoder, **self.heads[task - self.old_tasks]})
        return frozen_eval(network)

    def stored(self) -> StorageCost:
        """One encoder and the heads; the base that a pretrained agent's tasks need has the encoder in it."""
        old = pretrained_storage(self.pretrained)
        heads = sum(tensor_bytes(*head.values()) for head in self.heads)
        return StorageCost(old.shared or tensor_bytes(*self.encoder.values()), old.tasks + heads)

    def state(self) -> Tree:
        """Encoder and heads."""
        return {"tasks": self.tasks, "encoder": self.encoder, "heads": self.heads}

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.tasks, self.encoder, self.heads = state["tasks"], state["encoder"], state["heads"]

    def _is_fixed(self) -> bool:
        return self.pretrained is not None or bool(self.heads)
