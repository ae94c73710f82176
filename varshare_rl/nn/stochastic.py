"""Gaussian matrices per task, and the noise that they are drawn with: what may be held over several passes.

PPO needs the ratio of new to old policy to be 1 before its first step, so the noise a rollout was
collected with must be the noise of the updates on it. Everything else may draw anew at each pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from varshare_rl.nn.layer import TaskModule, stack_tasks, unstack_tasks
from varshare_rl.nn.task_rows import TaskRows, group_rows
from varshare_rl.ops.gaussian import gaussian_kl_between, softplus_sigma
from varshare_rl.ranks import for_rows


@dataclass(frozen=True)
class WeightNoise:
    """Standard normal draws in weight space for one layer.

    Attributes:
        values: for every factor ``[J, ...]``, draw by draw.
        index: the draw that each row of a batch ``[T, B]`` uses; None when draw ``j`` is that of task ``j``.
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


class GaussianFactors(TaskModule, ABC):
    """Module with one or two Gaussian matrices per task, its *factors*: ``N(mu, softplus(rho)^2)`` entry by entry.

    A subclass names the parameters in ``factors`` and gives their values for fresh tasks and their prior.

    Attributes:
        estimator, weight_samples: way of drawing when no noise is held, and draws per task and training pass.
        noise: the noise that training passes use, or None for fresh noise.
        theta_only: the factors are left out of the forward pass altogether.
    """

    #: Names of the mean and the ``rho`` of every factor.
    factors: tuple[tuple[str, str], ...] = ()
    penalized = True
    estimator: str = "weight"
    weight_samples: int = 1
    noise: Noise | None = None
    theta_only = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.per_task_parameters = tuple(name for pair in cls.factors for name in pair)
        cls.rho_parameters = tuple(rho for _, rho in cls.factors)

    @abstractmethod
    def fresh_factors(self, num_tasks: int) -> Mapping[str, Tensor]:
        """Initial values of all stacked parameters by name, for so many tasks."""

    @abstractmethod
    def prior(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Mean and standard deviation of every factor's prior, in shapes that broadcast to ``[T, ...]``."""

    @abstractmethod
    def row_noise_sizes(self) -> tuple[int, ...]:
        """Widths of the noise of one row, when every row has a draw of its own."""

    def register_factors(self, num_tasks: int) -> None:
        """Make the stacked parameters, for so many fresh tasks."""
        for name, value in self.fresh_factors(num_tasks).items():
            self.register_parameter(name, nn.Parameter(value))

    def posteriors(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and ``rho`` of every factor, each ``[T, ...]``."""
        return [(getattr(self, mu), getattr(self, rho)) for mu, rho in self.factors]

    def means(self, rows: TaskRows) -> list[Tensor]:
        """Means of every factor for the tasks of a batch, each ``[K, ...]``."""
        return [rows.select(mu) for mu, _ in self.posteriors()]

    def variances(self, rows: TaskRows, temperature: float) -> list[Tensor]:
        """Variances of every factor for the tasks of a batch, each ``[K, ...]``."""
        return [rows.select(softplus_sigma(rho, temperature).square()) for _, rho in self.posteriors()]

    def drawn(self, noise: Sequence[Tensor], temperature: float, tasks: Tensor | None = None) -> list[Tensor]:
        """The factors ``mu + sigma * noise``, ``[K, ...]``, of the given tasks (None: all in order)."""
        drawn = []
        for (mu, rho), epsilon in zip(self.posteriors(), noise, strict=True):
            sigma = softplus_sigma(rho, temperature)
            if tasks is None:
                drawn.append(torch.addcmul(mu, sigma, epsilon))
            else:
                ids = tasks.to(mu.device, non_blocking=True)
                drawn.append(torch.addcmul(mu.index_select(0, ids), sigma.index_select(0, ids), epsilon))
        return drawn

    def drawn_by_index(
        self, rows: TaskRows, held: WeightNoise, temperature: float
    ) -> tuple[TaskRows, list[Tensor]]:
        """The rows brought together by the held draw that each of them names, and the factors of each draw."""
        assert held.index is not None
        assert held.tasks is not None
        grouped = group_rows(rows.x.flatten(0, 1), held.index.flatten())
        assert grouped.ids is not None
        values = [value.index_select(0, grouped.ids.to(value.device)) for value in held.values]
        return grouped, self.drawn(values, temperature, held.tasks[grouped.ids.to(held.tasks.device)])

    def draw_noise(self, count: int) -> tuple[Tensor, ...]:
        """Standard normal noise for ``count`` draws of the factors, each ``[count, ...]``."""
        return tuple(mu.new_empty(count, *mu.shape[1:]).normal_() for mu, _ in self.posteriors())

    def draw_row_noise(self, shape: Sequence[int]) -> RowNoise:
        """Standard normal noise for one draw of the output per row; ``shape`` is ``[K, B]``."""
        like = self.posteriors()[0][0]
        empty = (like.new_empty(*shape, size) for size in self.row_noise_sizes())
        return RowNoise(tuple(for_rows(Tensor.normal_, rows) for rows in empty))

    def kl(self) -> Tensor:
        """Divergence of the posteriors from their priors, in nats per task, ``[T]``. No temperature in it."""
        divergences = [
            gaussian_kl_between(mu, softplus_sigma(rho), mean, std).flatten(1).sum(1)
            for (mu, rho), (mean, std) in zip(self.posteriors(), self.prior(), strict=True)
        ]
        return torch.stack(divergences).sum(0)

    @property
    def penalized_size(self) -> int:
        """Number of Gaussians of one task."""
        return sum(rho[0].numel() for _, rho in self.posteriors())

    @torch.no_grad()
    def second_moment(self) -> Tensor:
        """Mean of ``mu^2 + sigma^2`` over the entries of all factors, per task, ``[T]``."""
        squares = [(mu.square() + softplus_sigma(rho).square()).flatten(1) for mu, rho in self.posteriors()]
        return torch.cat(squares, dim=1).mean(1)

    def add_tasks(self, count: int = 1) -> range:
        """Append ``count`` fresh tasks and return their ids.

        Parameters are replaced by larger ones, so an optimiser must be given the new ones.
        """
        first = self.num_tasks
        stack_tasks(self, self.fresh_factors(count))
        self.noise = None
        return range(first, self.num_tasks)

    def remove_tasks(self, task_ids: list[int]) -> None:
        """Drop tasks; those behind them move up. Parameters are replaced, as in :meth:`add_tasks`."""
        kept = unstack_tasks(self, self.per_task_parameters, task_ids, self.num_tasks)
        for name in self.per_task_buffers:
            buffer = self.get_buffer(name)
            setattr(self, name, buffer[kept.to(buffer.device)])
        self.noise = None


def drawn_layers(module: nn.Module) -> Iterator[tuple[str, GaussianFactors]]:
    """All parts of ``module`` that draw their weights, with their dotted names, in order."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, GaussianFactors))


@contextmanager
def holding(layers: Mapping[str, GaussianFactors], noise: Mapping[str, Noise]) -> Iterator[None]:
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
