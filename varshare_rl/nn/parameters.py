"""Counting parameters and nats of whole networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from varshare_rl.nn.stochastic import PenalizedLayer, penalized_layers
from varshare_rl.nn.variational import VariationalLayer, summed_posterior_kl


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of an agent for ``T`` tasks.

    Attributes:
        stored: all trained parameters, ``shared + T * per_task``.
        active_per_task: those that one task's forward pass on the posterior mean uses: the shared ones and
            the task's own, without the spreads (``rho``).
        shared: parameters of all tasks together.
        per_task: parameters that belong to one task alone, spreads included.
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
    shared = per_task = spread = 0
    for module in modules:
        for layer in module.modules():
            own = getattr(layer, "per_task_parameters", ())
            for name, parameter in layer.named_parameters(recurse=False):
                if name not in own:
                    shared += parameter.numel()
                    continue
                per_task += parameter.numel() // num_tasks
                if name in getattr(layer, "rho_parameters", ()):
                    spread += parameter.numel() // num_tasks
    return ParameterCount(shared + num_tasks * per_task, shared + per_task - spread, shared, per_task)


@dataclass(frozen=True)
class TrainableCount:
    """Parameters of any module by whether they learn, each counted once.

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
    """The ``rho`` of all posteriors in ``module``: what their means do without."""
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


def summed_kl(layers: Sequence[PenalizedLayer]) -> Tensor:
    """Sum of what the weights per task of ``layers``, at least one, cost: ``[T]`` nats."""
    together = [layer for layer in layers if isinstance(layer, VariationalLayer) and not layer.has_given_prior]
    costs = [layer.kl() for layer in layers if layer not in together]
    if together:
        costs.append(summed_posterior_kl(together))
    return costs[0] if len(costs) == 1 else torch.stack(costs).sum(0)


def total_kl(module: nn.Module, num_tasks: int) -> Tensor:
    """Sum of what the layers' weights per task cost, ``[T]`` nats; zeros where nothing does."""
    layers = [layer for _, layer in penalized_layers(module)]
    if layers:
        return summed_kl(layers)
    like = next(module.parameters())
    return like.new_zeros(num_tasks)
