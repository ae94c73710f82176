"""Noise of the stochastic layers: what may be held over several passes, and how it is set.

PPO needs the ratio of new to old policy to be 1 before its first step, so the noise a rollout was
collected with must be the noise of the updates on it. Everything else may draw anew at each pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True)
class WeightNoise:
    """Standard normal draws in weight space for one layer.

    Attributes:
        values: for every factor ``[J, ...]``, draw by draw.
        index: which draw each row of a batch ``[T, B]`` uses; None when draw ``j`` is that of task ``j``.
        tasks: ``[J]``, the task of each draw; None together with ``index``.
    """

    values: tuple[Tensor, ...]
    index: Tensor | None = None
    tasks: Tensor | None = None


@dataclass(frozen=True)
class RowNoise:
    """Standard normal draws in output space for one layer, one for every row: each ``[T, B, size]``."""

    values: tuple[Tensor, ...]


Noise = WeightNoise | RowNoise


@runtime_checkable
class PenalizedLayer(Protocol):
    """A layer whose weights per task cost something.

    Whoever adds the cost to the loss on their own account sets ``paid_apart`` on the layer, which the ELBO then
    leaves alone.
    """

    def kl(self) -> Tensor:
        """What each task's weights cost, ``[T]`` nats."""


@runtime_checkable
class DrawnLayer(PenalizedLayer, Protocol):
    """A layer with a posterior over weights per task; ``kl`` is its divergence from the prior."""

    estimator: str  # how training passes draw when no noise is held
    weight_samples: int  # draws per task and pass of theirs
    noise: Noise | None  # what training passes use, when held
    theta_only: bool  # leave the residuals out

    @property
    def num_tasks(self) -> int:
        """``T``."""

    def draw_noise(self, count: int) -> tuple[Tensor, ...]:
        """Fresh noise for ``count`` draws of one task's weights."""

    def row_noise_sizes(self) -> tuple[int, ...]:
        """Widths of the noise of one row, when every row has a draw of its own."""


@runtime_checkable
class StochasticLayer(DrawnLayer, Protocol):
    """A layer with a posterior whose prior has zero mean and one scale per task, which can be moved."""

    log_prior_scale: Tensor  # [T]

    def second_moment(self) -> Tensor:
        """Mean of ``mu^2 + sigma^2`` over one task's Gaussian weights, ``[T]``."""


def penalized_layers(module: nn.Module) -> Iterator[tuple[str, PenalizedLayer]]:
    """All layers inside ``module`` whose weights per task cost something, with their dotted names, in order."""
    for name, child in module.named_modules():
        if isinstance(child, PenalizedLayer):
            yield name, child


def drawn_layers(module: nn.Module) -> Iterator[tuple[str, DrawnLayer]]:
    """All layers inside ``module`` that draw their weights, with their dotted names, in order."""
    for name, child in module.named_modules():
        if isinstance(child, DrawnLayer):
            yield name, child


def stochastic_layers(module: nn.Module) -> Iterator[tuple[str, StochasticLayer]]:
    """Those among them whose prior's scale can be moved."""
    for name, child in module.named_modules():
        if isinstance(child, StochasticLayer):
            yield name, child


@contextmanager
def holding(layers: Mapping[str, DrawnLayer], noise: Mapping[str, Noise]) -> Iterator[None]:
    """Inside, training passes of ``layers`` use the given noise, by name; afterwards what they used before."""
    before = {name: layer.noise for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.noise = noise[name]
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.noise = before[name]


@contextmanager
def theta_only(module: nn.Module) -> Iterator[None]:
    """Inside, the layers with a posterior of ``module`` apply their shared weights alone."""
    layers = [layer for _, layer in drawn_layers(module)]
    for layer in layers:
        layer.theta_only = True
    try:
        yield
    finally:
        for layer in layers:
            layer.theta_only = False


@contextmanager
def posterior_mean(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` uses the means of its posteriors; afterwards its mode is as before."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
