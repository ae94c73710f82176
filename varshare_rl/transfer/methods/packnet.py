"""PackNet: tasks share one network by owning different weights of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varshare_rl.fields import bounded
from varshare_rl.nn.packnet import PackedLayer
from varshare_rl.nn.shared import SharedLayer
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

FREE = -1  # owner of an entry that no task owns


@register("method", "packnet")
@dataclass
class PackNetConfig(ContinualMethodConfig):
    """``method=packnet``."""

    name: str = "packnet"
    share_per_task: float = bounded(0.25, above=0, most=1)
    "Share that a task keeps of the weights still free in each layer."
    prune_at: float = bounded(0.5, least=0, most=1)
    "Share of the task's budget after which it gives up the rest."

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> PackNet:
        """Make the method."""
        return PackNet(self, spec, pretrained)


class PackNet(OwnParameters):
    """Every task trains the free weights, gives up the smallest, and owns what is left (Mallya and Lazebnik 2018).

    Task ``i`` computes with the weights of owners ``<= i``. It trains all free ones until ``prune_at``, keeps the
    largest ``share_per_task`` of them in each layer, and trains these on; the others are 0 and the next task's.
    Task ``i`` (from 0) thus gets ``share (1 - share)^i`` of all weights. Biases and LayerNorms are learnt on the
    first task and frozen after it, and every task has a fresh last layer of its own, as in the paper.

    A pretrained agent's base has no free weights, and to prune it would change its tasks: they keep it apart, and
    the sequence starts from a copy of it that nobody owns.

    Raises:
        UserError: the network has no hidden layer.
    """

    state_fields = ("body", "owners", "heads=own")

    def __init__(self, config: PackNetConfig, spec: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, spec, pretrained)
        network = self.base_network()
        self.head = head_path(network, config.name)
        self.body = split_head(state_copy(network), self.head)[0]
        layers = [path for path, layer in network.named_modules() if isinstance(layer, SharedLayer)]
        self.owners = {
            path: torch.full_like(self.body[f"{path}.theta"], FREE, dtype=torch.int16)
            for path in layers
            if path != self.head
        }

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """Make the body under a fresh head; free weights and head are trained, and at first biases and norms."""
        network = self.spec.stack(PackedLayer)
        in_features = network.get_submodule(self.head).in_features
        assert isinstance(in_features, int)
        network.set_submodule(self.head, SharedLayer(in_features, self.spec.out_features))
        network.load_state_dict({**network.state_dict(), **self.body})
        if self.own:
            network.requires_grad_(False)
            network.get_submodule(self.head).requires_grad_(True)
        for path, layer in packed_layers(network):
            layer.allot(self.owners[path] == FREE)
            layer.theta.requires_grad_(True)
        return network

    def trained_parameters(self, network: nn.Module) -> int:
        """Count without the weights that other tasks own, which lie in the same tensors."""
        held = sum(int((~layer.trained).sum()) for _, layer in packed_layers(network))
        return super().trained_parameters(network) - held

    def advance(self, network: nn.Module, fraction: float) -> None:
        """Give up weights when it is time."""
        if fraction >= self.config.prune_at:
            self._prune(network)

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Hand the weights that were kept to the task; one that was never told to advance prunes here."""
        self._prune(network)
        state, head = split_head(state_copy(network), self.head)
        body = {name: state[name] for name in self.body}
        owners = {}
        for path, layer in packed_layers(network):
            body[f"{path}.theta"] = layer.weight().detach()
            owner = self.owners[path].to(layer.trained.device)
            owners[path] = owner.masked_fill(layer.trained, len(self.own))
        self.body, self.owners = body, owners
        self.keep(head)

    def own_network(self, number: int) -> nn.Module:
        """Make the network of the weights of the task and of those before it, under the task's head."""
        body = dict(self.body)
        for path, owner in self.owners.items():
            used = (owner != FREE) & (owner <= number)
            body[f"{path}.theta"] = torch.where(used, body[f"{path}.theta"], 0.0)
        return self.spec.plain({**body, **self.own[number]})

    def stored(self) -> StorageCost:
        """Return the bytes of a body, a head per task, ``ceil(log2(tasks + 1))`` bits per weight for its owner."""
        bits = math.ceil(math.log2(len(self.own) + 1)) * sum(owner.numel() for owner in self.owners.values())
        own = StorageCost(state_bytes(self.body), state_bytes(*self.own) + math.ceil(bits / 8))
        return pretrained_storage(self.pretrained) + own

    def _prune(self, network: nn.Module) -> None:
        for _, layer in packed_layers(network):
            layer.prune(self.config.share_per_task)


def packed_layers(network: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """Yield the packed layers of a network with their paths."""
    for path, layer in network.named_modules():
        if isinstance(layer, PackedLayer):
            yield path, layer
