"""Parameters and nats of whole networks counted, and widths that give architectures the same number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from varshare_rl.errors import UserError
from varshare_rl.nn.config import NetworkConfig
from varshare_rl.nn.layer import penalized_layers
from varshare_rl.nn.variational import summed_kl

#: Largest distance of an agent from the number that was asked for, as a fraction of it.
TOLERANCE = 0.02


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of an agent for ``T`` tasks.

    Attributes:
        stored: all trained parameters, ``shared + T * per_task``.
        active_per_task: those that one task's forward pass on the posterior mean uses: the shared ones and
            the task's own, without the ``rho`` of the posteriors.
        shared: parameters of all tasks together.
        per_task: parameters that belong to one task alone, ``rho`` included.
    """

    stored: int
    active_per_task: int
    shared: int
    per_task: int

    def as_dict(self) -> dict[str, int]:
        """The four numbers by name."""
        return asdict(self)


def count_parameters(modules: Iterable[nn.Module], num_tasks: int) -> ParameterCount:
    """Count what ``modules`` train; layers name their stacked parameters in ``per_task_parameters``."""
    shared = per_task = rhos = 0
    for module in modules:
        for layer in module.modules():
            own = getattr(layer, "per_task_parameters", ())
            for name, parameter in layer.named_parameters(recurse=False):
                if name not in own:
                    shared += parameter.numel()
                    continue
                per_task += parameter.numel() // num_tasks
                if name in getattr(layer, "rho_parameters", ()):
                    rhos += parameter.numel() // num_tasks
    return ParameterCount(shared + num_tasks * per_task, shared + per_task - rhos, shared, per_task)


@dataclass(frozen=True)
class TrainableCount:
    """Parameters of any module, those that learn and those that do not, each counted once.

    (:func:`count_parameters` asks another question: how much of an agent belongs to which task.)
    """

    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trainable + self.frozen

    @property
    def percent(self) -> float:
        """Of all parameters those that learn, in per cent."""
        return 100.0 * self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters learn ({self.percent:.3g} %)"


def count_trainable(module: nn.Module) -> TrainableCount:
    """Count the parameters of any module by ``requires_grad``."""
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return TrainableCount(trainable, sum(parameter.numel() for parameter in module.parameters()) - trainable)


def shared_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``module`` that all tasks train together."""
    return [
        parameter
        for layer in module.modules()
        for name, parameter in layer.named_parameters(recurse=False)
        if name not in getattr(layer, "per_task_parameters", ()) and parameter.requires_grad
    ]


def rho_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The ``rho`` of all posteriors in ``module``, which their means do without."""
    return [
        layer.get_parameter(name) for layer in module.modules() for name in getattr(layer, "rho_parameters", ())
    ]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter of ``module`` requires a gradient; afterwards those that did do again."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def total_kl(module: nn.Module, num_tasks: int) -> Tensor:
    """Sum of what the layers' weights per task cost, ``[T]`` nats; zeros where nothing does."""
    layers = [layer for _, layer in penalized_layers(module)]
    if layers:
        return summed_kl(layers)
    like = next(module.parameters())
    return like.new_zeros(num_tasks)


def with_width(architecture: NetworkConfig, width: int) -> NetworkConfig:
    """The same options with hidden layers that are as many as before and all of one ``width``."""
    changed = copy(architecture)
    changed.hidden = [width] * len(architecture.hidden)
    return changed


def match_width(
    architecture: NetworkConfig, build: Callable[[NetworkConfig], Sequence[nn.Module]], num_tasks: int
) -> list[int]:
    """The hidden sizes, all equal, that come nearest to ``architecture.active_parameters``.

    What is counted is ``active_per_task`` of :func:`count_parameters` over the networks
    that ``build`` makes from an architecture. They are built without memory, for a number of widths that is
    logarithmic in the result: the count grows with the width.

    Raises:
        UserError: no width comes within :data:`TOLERANCE`.
    """
    target, least = architecture.active_parameters, architecture.least_width()
    assert target is not None
    if not architecture.hidden:
        raise UserError(
            "network.active_parameters sets the width of hidden layers, and network.hidden has none; "
            "give network.hidden=[64,64] for two, or leave active_parameters out"
        )

    def active(width: int) -> int:
        candidate = with_width(architecture, width)
        with torch.device("meta"):
            return count_parameters(build(candidate), num_tasks).active_per_task

    below, above = least, least + 1
    while active(above) < target:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if active(middle) < target else (below, middle)
    counts = {width: active(width) for width in (below, above)}
    best = min(counts, key=lambda width: abs(counts[width] - target))
    if abs(counts[best] - target) > TOLERANCE * target:
        layers = len(architecture.hidden)
        agent = f"network={architecture.name} with {layers} hidden layers"
        found = (
            f"the smallest {agent} has {counts[below]}; give at least that many"
            if target < counts[below]
            else f"the nearest of {agent} are {counts[below]} and {counts[above]}; give one of them"
        )
        raise UserError(f"network.active_parameters is {target}; {found}")
    return [best] * len(architecture.hidden)
