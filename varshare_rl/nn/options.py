"""What all architectures have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol

from torch import nn

from varshare_rl.nn.bronet import BroNet
from varshare_rl.nn.mlp import TaskMLP


class Blocks(Enum):
    """What hidden layers are made into: a plain stack, or residual blocks with LayerNorm."""

    mlp = "mlp"
    bronet = "bronet"


@dataclass(frozen=True)
class Posterior:
    """Settings of the per-task posteriors; architectures without one ignore them."""

    prior_scale: float = 1.0
    estimator: str | None = None  # None: the architecture's own
    temperature: float = 1.0


@dataclass
class ArchitectureOptions:
    """Options of every architecture: sizes of the hidden layers, their activation, LayerNorm before it, blocks."""

    #: Ways to draw the weights, the architecture's own first; none without a posterior.
    estimators: ClassVar[tuple[str, ...]] = ()
    name: str = "???"
    hidden: list[int] = field(default_factory=lambda: [64, 64])
    activation: str = "tanh"
    layer_norm: bool = False
    blocks: Blocks = Blocks.mlp

    def stack(
        self,
        in_features: int,
        out_features: int,
        layer: Callable[[int, int], nn.Module],
        temperature: float = 1.0,
    ) -> nn.Module:
        """The network of the chosen blocks, from a maker of task layers; BroNet has its LayerNorms anyway."""
        sizes = [in_features, *self.hidden, out_features]
        if self.blocks is Blocks.bronet:
            return BroNet(sizes, layer, self.activation, temperature)
        return TaskMLP(sizes, layer, self.activation, temperature, self.layer_norm)


class Architecture(Protocol):
    """Builds networks ``network(x [T, B, F], task_ids [T]) -> [T, B, G]`` for a number of tasks."""

    estimators: ClassVar[tuple[str, ...]]
    name: str
    hidden: list[int]
    activation: str
    layer_norm: bool
    blocks: Blocks

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        """A network from ``in_features`` to ``out_features``; its linear layers include the head."""
