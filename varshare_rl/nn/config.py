"""What all architectures have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol

from torch import nn

from varshare_rl.errors import UserError
from varshare_rl.nn.mlp import BroNet, TaskMLP


class Blocks(Enum):
    """What hidden layers are made into: a plain stack, or residual blocks with LayerNorm."""

    mlp = "mlp"
    bronet = "bronet"


class PriorUnits(Enum):
    """Units of ``elbo.prior_scale``."""

    theta = "theta"  # standard deviation of a residual's entries at the prior over that of theta's at the start
    absolute = "absolute"  # standard deviation of every Gaussian's prior


class PosteriorStart(Enum):
    """Standard deviations that fresh posteriors start with."""

    narrow = "narrow"  # softplus(-5) = 0.0067
    prior = "prior"  # those of the prior, so that a fresh posterior costs next to nothing


@dataclass(frozen=True)
class Posterior:
    """Settings of the per-task posteriors; networks without one ignore them."""

    prior_scale: float = 1.0
    prior_units: PriorUnits = PriorUnits.absolute
    start: PosteriorStart = PosteriorStart.narrow
    estimator: str | None = None  # None: the network's own
    temperature: float = 1.0
    weight_samples: int = 1  # draws per task and training pass

    def factor_scale(self, in_features: int, rank: int | None, scale: float = 1.0) -> float:
        """Return the prior's standard deviation of every Gaussian of a layer.

        In units of theta, with ``f = prior_scale`` and ``std(theta) = 1 / sqrt(3 in_features)`` at the start, that of
        a full-rank residual is ``f std(theta)``. Entries of ``scale B A`` have ``scale sqrt(rank) p^2`` for factors of
        ``p``, hence ``p^2 = f / (scale sqrt(3 rank in_features))``.
        """
        if self.prior_units is PriorUnits.absolute:
            return self.prior_scale
        if rank is None:
            return self.prior_scale / math.sqrt(3 * in_features)
        return math.sqrt(self.prior_scale / (abs(scale) * math.sqrt(3 * rank * in_features)))


@dataclass
class NetworkConfig:
    """Options of every architecture: sizes of the hidden layers, their activation, LayerNorm before it, blocks.

    With ``active_parameters`` the hidden layers get one width, such that the whole agent has about so many active
    parameters per task (see :mod:`varshare_rl.nn.capacity`); ``hidden`` then only says how many layers there are.
    """

    #: How training draws the weights unless told otherwise; None without a posterior.
    default_estimator: ClassVar[str | None] = None
    name: str = "???"
    hidden: list[int] = field(default_factory=lambda: [64, 64])
    activation: str = "tanh"
    layer_norm: bool = False
    active_parameters: int | None = None
    blocks: Blocks = Blocks.mlp

    def least_width(self) -> int:
        """The narrowest that all hidden layers may be."""
        return 1

    def require_hidden(self) -> None:
        """Raise UserError unless there is a hidden layer."""
        if not self.hidden:
            raise UserError(f"network={self.name} needs a hidden layer; give network.hidden=[64], for example")

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

    default_estimator: ClassVar[str | None]
    name: str
    hidden: list[int]
    activation: str
    layer_norm: bool
    active_parameters: int | None
    blocks: Blocks

    def least_width(self) -> int:
        """The narrowest that all hidden layers may be."""

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        """A network from ``in_features`` to ``out_features``; its linear layers include the head."""
