"""Options that all architectures have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from torch import nn

from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.mlp import BroNet, NormMaker, SharedLayerNorm, TaskMLP


class Blocks(Enum):
    """Arrangement of the hidden layers: a plain stack, or residual blocks with LayerNorm."""

    mlp = "mlp"
    bronet = "bronet"


class Initialization(Enum):
    """Distributions of the initial weights of linear layers."""

    uniform = "uniform"  # that of torch.nn.Linear
    orthogonal = "orthogonal"  # of gain sqrt(2), and 1 for the last layer; biases are 0


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

    def unit(self, in_features: int, rank: int | None, scale: float = 1.0) -> tuple[float, float]:
        """Return ``u`` and ``k`` of a layer: Gaussians have the prior's standard deviation ``(u prior_scale)^k``.

        In units of theta, with ``f = prior_scale`` and ``std(theta) = 1 / sqrt(3 in_features)`` at the start, a
        full-rank residual has ``f std(theta)``. Entries of ``scale B A`` have ``scale sqrt(rank) p^2`` for factors
        of ``p``, hence ``p^2 = f / (scale sqrt(3 rank in_features))``.
        """
        if self.prior_units is PriorUnits.absolute:
            return 1.0, 1.0
        if rank is None:
            return 1.0 / math.sqrt(3 * in_features), 1.0
        return 1.0 / (abs(scale) * math.sqrt(3 * rank * in_features)), 0.5

    def factor_scale(self, in_features: int, rank: int | None, scale: float = 1.0) -> float:
        """Return the prior's standard deviation of a layer's Gaussians, see :meth:`unit`."""
        unit, power = self.unit(in_features, rank, scale)
        return float((unit * self.prior_scale) ** power)


def check_layers(layers: Any, prefix: str) -> None:
    """Raise UserError unless ``layers`` is ``all``, ``last``, or a list of names."""
    if layers in ("all", "last"):
        return
    if (
        isinstance(layers, str)
        or not isinstance(layers, Sequence)
        or not layers
        or not all(isinstance(name, str) for name in layers)
    ):
        raise UserError(f"{prefix}layers is {layers!r}; give all, last, or a list of names: [layers.0]")


def chosen_layers(paths: Sequence[str], layers: Any, option: str = "layers") -> list[str]:
    """Return the paths of a network's linear layers, in order, that ``layers`` chooses, which is ``option``.

    Raises:
        UserError: a name is none of them.
    """
    if layers in ("all", "last"):
        return list(paths if layers == "all" else paths[-1:])
    for name in layers:
        if name not in paths:
            raise UserError(
                f"{option} has {name!r}, and there is no such layer in this network; give all, last, or a list of "
                f"some of {', '.join(paths)}"
            )
    return [path for path in paths if path in layers]


@dataclass
class NetworkConfig(ABC):
    """Options of every architecture: sizes of the hidden layers, their activation, LayerNorm before it, blocks.

    With ``active_parameters`` the hidden layers get one width, such that the whole agent has about so many active
    parameters per task (see :mod:`varshare_rl.nn.parameters`); ``hidden`` then only says how many layers there are.
    """

    #: Name of the estimator of training passes unless told otherwise; None without a posterior.
    default_estimator: ClassVar[str | None] = None
    name: str = "???"
    hidden: list[int] = bounded([64, 64], least=1)
    "Sizes of the hidden layers."
    activation: str = "tanh"
    "Activation of the hidden layers: `tanh`, `relu` and others; a wrong name lists them."
    layer_norm: bool = False
    "LayerNorm before every activation."
    active_parameters: int | None = bounded(None, least=1)
    "One width for all hidden layers that gives the agent about so many active parameters per task; null: `hidden`."
    blocks: Blocks = Blocks.mlp
    "Blocks of the hidden layers: a plain stack, or residual ones with LayerNorm."

    initialization: Initialization = Initialization.uniform
    """Initial weights: uniform as PyTorch's linear layers have them, or orthogonal with gain sqrt(2), 1 in the last
    layer, and biases 0. `elbo.prior_scale` stays in units of the uniform one."""
    output_gain: float = bounded(1.0, least=0)
    "Factor on the initial weights and biases of the last layer; small ones begin near the action 0."

    @abstractmethod
    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        """A network ``network(x [T, B, F], task_ids [T]) -> [T, B, G]``; its linear layers include the head."""

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
        norm: NormMaker = SharedLayerNorm,
    ) -> nn.Module:
        """The network of the chosen blocks, from makers of layers and norms; BroNet has its LayerNorms anyway."""
        sizes = [in_features, *self.hidden, out_features]
        if self.blocks is Blocks.bronet:
            return BroNet(sizes, layer, self.activation, temperature, norm)
        return TaskMLP(sizes, layer, self.activation, temperature, self.layer_norm, norm)
