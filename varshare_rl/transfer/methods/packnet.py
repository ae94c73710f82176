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

FREE = -1  # owner of an entry that no task owns


@register("method", "packnet")
@dataclass
class PackNetConfig(ContinualMethodConfig):
    """``method=packnet``."""

    name: str = "packnet"
    share_per_task: float = bounded(0.25, above=0, most=1)
    "What a task keeps of the weights still free in each layer."
    prune_at: float = bounded(0.5, least=0, most=1)
    "Share of the task's budget after which it gives up the rest."

    def build(self, shape: NetworkSpec, pretrained: Pretrained | None = None) -> PackNet:
        """The method."""
        return PackNet(self, shape, pretrained)


class PackNet(ContinualMethod):
    """Every task trains the free weights, gives up the smallest, and owns what is left (Mallya and Lazebnik 2018).

    Task ``i`` computes with the weights of owners ``<= i``. It trains all free ones until ``prune_at``, keeps the
    largest ``share_per_task`` of them in each layer, and trains these on; the others are 0 and the next task's.
    Task ``i`` (from 0) thus gets ``share (1 - share)^i`` of all weights. Biases and LayerNorms are learnt on the
    first task and frozen after it, and every task has a fresh last layer of its own, as in the paper.

    An origin's base has no free weights, and to prune it would change its tasks: they keep it apart, and the
    sequence starts from a copy of it that nobody owns.

    Raises:
        UserError: the network has no hidden layer.
    """

    def __init__(self, config: PackNetConfig, shape: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, shape, pretrained)
        network = self.base_network()
        self.head = head_path(network, config.name)
        self.body = split_head(state_copy(network), self.head)[0]
        layers = [path for path, layer in network.named_modules() if isinstance(layer, SharedLayer)]
        self.owners = {
            path: torch.full_like(self.body[f"{path}.theta"], FREE, dtype=torch.int16)
            for path in layers
            if path != self.head
        }
        self.heads: list[dict[str, Tensor]] = []

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """The body under a fresh head; trained are the free weights and the head, and at first biases and norms."""
        network = self.shape.stack(PackedLayer)
        in_features = network.get_submodule(self.head).in_features
        assert isinstance(in_features, int)
        network.set_submodule(self.head, SharedLayer(in_features, self.shape.out_features))
        network.load_state_dict({**network.state_dict(), **self.body})
        if self.heads:
            network.requires_grad_(False)
            network.get_submodule(self.head).requires_grad_(True)
        for path, layer in packed_layers(network):
            layer.allot(self.owners[path] == FREE)
            layer.theta.requires_grad_(True)
        return network

    def trained_parameters(self, network: nn.Module) -> int:
        """Without the weights that other tasks own, which lie in the same tensors."""
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
            owners[path] = owner.masked_fill(layer.trained, len(self.heads))
        self.body, self.owners, self.heads = body, owners, [*self.heads, head]
        self.tasks += 1

    def policy(self, task: int) -> nn.Module:
        """The weights of the task and of those before it, under the task's head."""
        self.check_learnt(task)
        if self.pretrained is not None and task < self.old_tasks:
            return pretrained_policy(self.shape, self.pretrained, task)
        number = task - self.old_tasks
        body = dict(self.body)
        for path, owner in self.owners.items():
            used = (owner != FREE) & (owner <= number)
            body[f"{path}.theta"] = torch.where(used, body[f"{path}.theta"], 0.0)
        network = self.shape.plain()
        network.load_state_dict({**body, **self.heads[number]})
        return frozen_eval(network)

    def stored(self) -> StorageCost:
        """One body; a head per task, and ``ceil(log2(tasks + 1))`` bits per weight for its owner."""
        old = pretrained_storage(self.pretrained)
        heads = sum(tensor_bytes(*head.values()) for head in self.heads)
        bits = math.ceil(math.log2(len(self.heads) + 1)) * sum(owner.numel() for owner in self.owners.values())
        return StorageCost(old.shared + tensor_bytes(*self.body.values()), old.tasks + heads + math.ceil(bits / 8))

    def state(self) -> Tree:
        """Body, owners and heads."""
        return {"tasks": self.tasks, "body": self.body, "owners": self.owners, "heads": self.heads}

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.tasks, self.body = state["tasks"], state["body"]
        self.owners, self.heads = state["owners"], state["heads"]

    def _prune(self, network: nn.Module) -> None:
        for _, layer in packed_layers(network):
            layer.prune(self.config.share_per_task)


def packed_layers(network: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """The packed layers of a network with their paths."""
    for path, layer in network.named_modules():
        if isinstance(layer, PackedLayer):
            yield path, layer
