"""Shared-private: a frozen encoder for all tasks, and a head of its own for each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from varshare_rl.registry import register
from varshare_rl.transfer.bases import OwnParameters, head_path, split_head
from varshare_rl.transfer.method import (
    ContinualMethodConfig,
    NetworkSpec,
    Pretrained,
    StorageCost,
    state_bytes,
    state_copy,
)
from varshare_rl.transfer.pretrained import pretrained_storage


@register("method", "shared_private")
@dataclass
class SharedPrivateConfig(ContinualMethodConfig):
    """``method=shared_private``."""

    name: str = "shared_private"

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> SharedPrivate:
        """Make the method."""
        return SharedPrivate(self, spec, pretrained)


class SharedPrivate(OwnParameters):
    """All layers but the last, LayerNorms among them, are learnt on the first task and frozen from then on.

    Every task learns a fresh last layer. With a pretrained agent the encoder is that of its base and never learns.

    Raises:
        UserError: the network has no hidden layer.
    """

    state_fields = ("encoder", "heads=own")

    def __init__(
        self, config: SharedPrivateConfig, spec: NetworkSpec, pretrained: Pretrained | None = None
    ) -> None:
        super().__init__(config, spec, pretrained)
        network = self.base_network()
        self.head = head_path(network, config.name)
        self.encoder = split_head(state_copy(network), self.head)[0]

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """Make the encoder under a fresh head; only the head is trained once the encoder is fixed."""
        network = self.spec.plain()
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
        self.keep(head)

    def own_network(self, number: int) -> nn.Module:
        """Make the encoder under the task's head."""
        return self.spec.plain({**self.encoder, **self.own[number]})

    def stored(self) -> StorageCost:
        """Return the bytes of one encoder and the heads; a base that old tasks need has the encoder in it."""
        old = pretrained_storage(self.pretrained)
        return StorageCost(old.shared or state_bytes(self.encoder), old.tasks + state_bytes(*self.own))

    def _is_fixed(self) -> bool:
        return self.pretrained is not None or bool(self.own)
