"""Layers with a Gaussian posterior over weights per task, and how far their residuals scatter."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.nn.initial import check_positive, stack_tasks, unstack_tasks
from varshare_rl.nn.stochastic import Noise, RowNoise, WeightNoise
from varshare_rl.nn.task_rows import TaskIds, TaskRows, group_rows, task_rows
from varshare_rl.ops.gaussian import gaussian_kl_between, posterior_kl, softplus_sigma
from varshare_rl.ops.gradient_record import GradientRecord, Recorder
from varshare_rl.ops.task_weights import TaskWeights


class Estimator(Enum):
    """How a training pass draws the weights when no noise is held, see :class:`VariationalLayer`."""

    weight = "weight"
    local = "local"
    flipout = "flipout"
    mean = "mean"


#: Their names.
ESTIMATORS = tuple(estimator.value for estimator in Estimator)


class VariationalLayer(nn.Module, ABC):
    """Linear layer whose weight for task ``i`` is a shared ``theta`` plus a residual with a Gaussian posterior.

    The residual is made of one or two Gaussian matrices per task, its *factors*. In eval mode, or at temperature
    0, their means are used. In training mode they are drawn with the reparameterisation trick: with the noise
    that is held (see :mod:`varshare_rl.nn.stochastic`), or else anew at each pass, as the ``estimator`` says:

    - ``weight``: one draw per task, or ``weight_samples`` draws that each serve a share of the rows;
    - ``local``: a draw of its own for every row, in output space (Kingma, Salimans and Welling 2015);
    - ``flipout``: one draw per task whose signs are random for every row (Wen et al. 2018);
    - ``mean``: no draw.

    Args:
        in_features: size of the input, ``F``.
        out_features: size of the output, ``G``.
        num_tasks: number of tasks, ``T``.
        prior_scale: standard deviation of the zero-mean Gaussian prior of every factor entry, at the start.
        estimator: one of :data:`ESTIMATORS`.
        weight_samples: draws per task and pass of ``weight`` and ``flipout``.

    Attributes:
        log_prior_scale: ``[T]``, natural logarithm of each task's prior standard deviation.
        noise: the noise that training passes use, or None for fresh noise.
        theta_only: leave the residuals out altogether.
        paid_apart: somebody else adds the divergence to the loss, and the ELBO does not.
        has_given_prior: see :meth:`give_prior`.
    """

    #: Names of the mean and the ``rho`` of every factor.
    factors: ClassVar[tuple[tuple[str, str], ...]]
    per_task_buffers = ("log_prior_scale",)
    theta: nn.Parameter
    bias: nn.Parameter | None
    log_prior_scale: Tensor
    scale: float = 1.0  # what the residual that the factors make is multiplied by

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tasks: int,
        prior_scale: float,
        estimator: str,
        weight_samples: int,
    ) -> None:
        super().__init__()
        check_positive(
            in_features=in_features,
            out_features=out_features,
            num_tasks=num_tasks,
            prior_scale=prior_scale,
            weight_samples=weight_samples,
        )
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}; there are {', '.join(ESTIMATORS)}")
        self.in_features, self.out_features = in_features, out_features
        self.estimator, self.weight_samples = estimator, weight_samples
        self.noise: Noise | None = None
        self.theta_only = False
        self.paid_apart = False
        self.has_given_prior = False
        self.recorder: Recorder | None = None  # who wants theta's and bias's gradients per task
        self.register_buffer("log_prior_scale", torch.full((num_tasks,), float(prior_scale)).log())

    @property
    def num_tasks(self) -> int:
        """Number of tasks, ``T``."""
        first: Tensor = getattr(self, self.factors[0][0])
        return first.shape[0]

    @property
    def prior_scale(self) -> Tensor:
        """Standard deviation of each task's prior, ``[T]``."""
        return self.log_prior_scale.exp()

    def forward(self, x: Tensor, task_id: TaskIds, temperature: float = 1.0) -> Tensor:
        """Apply each row's own task's weights.

        Args:
            x: ``[T, B, F]`` with ids ``[T]``, flat ``[N, F]`` with ids ``[N]``, or any ``[..., F]`` with one id.
            task_id: see ``x``.
            temperature: factor on every sigma; 0 gives the means.

        Returns:
            The output in the layout of ``x``, ``G`` wide.

        Raises:
            IndexError: an unknown task id.
            ValueError: shapes that do not fit each other.
        """
        rows = task_rows(x, task_id, self.num_tasks)
        return rows.restore(self._output(rows, temperature))

    def _output(self, rows: TaskRows, temperature: float) -> Tensor:
        if self.theta_only:
            return self.shared_output(rows.x, self._recording(rows))
        if not self.training or temperature == 0:
            return self._mean(rows)
        if self.noise is not None:
            if isinstance(self.noise, RowNoise):
                return self._local(rows, temperature, self.noise)
            return self._drawn(rows, temperature, self.noise)
        if self.estimator == "mean":
            return self._mean(rows)
        if self.estimator == "local":
            return self._local(rows, temperature, self.draw_row_noise(rows.x.shape[:2]))
        split = rows.split(self.weight_samples)
        noise = self.draw_noise(split.x.shape[0])
        if self.estimator == "flipout":
            return rows.merge(self._flipout(split, temperature, noise))
        drawn = self.weights(noise, temperature, split.ids)
        return rows.merge(self.output(split.x, drawn, self._recording(split)))

    def _recording(self, rows: TaskRows) -> GradientRecord | None:
        """For blocks that are the tasks in order: only then is a block's gradient that of a task."""
        if self.recorder is None or rows.ids is not None:
            return None
        return GradientRecord(self.recorder, self.theta, self.bias)

    def _mean(self, rows: TaskRows) -> Tensor:
        return self.output(rows.x, [rows.select(mu) for mu, _ in self.posteriors()], self._recording(rows))

    def _drawn(self, rows: TaskRows, temperature: float, held: WeightNoise) -> Tensor:
        """With held draws: one per task, or one per group of rows."""
        if held.index is None:
            drawn = self.weights(held.values, temperature)
            return self.output(rows.x, [rows.select(weight) for weight in drawn], self._recording(rows))
        grouped = group_rows(rows.x.flatten(0, 1), held.index.flatten())
        assert grouped.ids is not None
        assert held.tasks is not None
        values = [value.index_select(0, grouped.ids.to(value.device)) for value in held.values]
        drawn = self.weights(values, temperature, held.tasks[grouped.ids.to(held.tasks.device)])
        return grouped.restore(self.output(grouped.x, drawn)).view(*rows.x.shape[:2], -1)

    def _local(self, rows: TaskRows, temperature: float, noise: RowNoise) -> Tensor:
        means = [rows.select(mu) for mu, _ in self.posteriors()]
        variances = [rows.select(softplus_sigma(rho, temperature).square()) for _, rho in self.posteriors()]
        return self.local_output(rows.x, means, variances, noise.values, self._recording(rows))

    def _flipout(self, rows: TaskRows, temperature: float, noise: Sequence[Tensor]) -> Tensor:
        means = [rows.select(mu) for mu, _ in self.posteriors()]
        sigmas = [rows.select(softplus_sigma(rho, temperature)) for _, rho in self.posteriors()]
        deltas = [sigma * epsilon for sigma, epsilon in zip(sigmas, noise, strict=True)]
        return self.flipout_output(rows.x, means, deltas, self._recording(rows))

    def posteriors(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and ``rho`` of every factor, each ``[T, ...]``."""
        return [(getattr(self, mu), getattr(self, rho)) for mu, rho in self.factors]

    def weights(self, noise: Sequence[Tensor], temperature: float, tasks: Tensor | None = None) -> list[Tensor]:
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

    @abstractmethod
    def shared_output(self, x: Tensor, record: GradientRecord | None = None) -> Tensor:
        """``x theta^T + bias``, without residuals; ``record`` is handed on to the product with ``theta``."""

    @abstractmethod
    def output(self, x: Tensor, factors: Sequence[Tensor], record: GradientRecord | None = None) -> Tensor:
        """``x: [K, B, F]`` and one set of factors ``[K, ...]`` per block to ``[K, B, G]``."""

    @abstractmethod
    def local_output(
        self,
        x: Tensor,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        noise: Sequence[Tensor],
        record: GradientRecord | None = None,
    ) -> Tensor:
        """The output under a draw of its own for every row, from noise as :meth:`draw_row_noise` gives it."""

    @abstractmethod
    def flipout_output(
        self, x: Tensor, means: Sequence[Tensor], deltas: Sequence[Tensor], record: GradientRecord | None = None
    ) -> Tensor:
        """The output under the perturbations ``deltas`` of the means, with random signs for every row."""

    @abstractmethod
    def task_weights(self) -> TaskWeights:
        """The mean weights of all tasks and their spread, see :mod:`varshare_rl.nn.sharing`."""

    @abstractmethod
    def fresh_factors(self, num_tasks: int) -> Mapping[str, Tensor]:
        """Initial values of all stacked parameters by name, for so many tasks."""

    @abstractmethod
    def row_noise_sizes(self) -> tuple[int, ...]:
        """Widths of the noise of one row in :meth:`local_output`."""

    def kl(self) -> Tensor:
        """Divergence of the posteriors from their priors, in nats per task, ``[T]``. No temperature in it."""
        return self._kl_from_given() if self.has_given_prior else summed_posterior_kl([self])

    def give_prior(self, prior: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Have :meth:`kl` measure from ``N(mean, std^2)`` entry by entry in place of ``N(0, prior_scale^2)``.

        ``prior`` has mean and standard deviation of every factor, in shapes that broadcast to ``[T, ...]``. They
        are buffers that follow the layer to its device but are not in its state dict: a prior is given again.
        """
        for (name, _), pair in zip(self.factors, prior, strict=True):
            for part, value in zip(("mean", "std"), pair, strict=True):
                self.register_buffer(f"prior_{part}_of_{name}", value.to(self.theta), persistent=False)
        self.has_given_prior = True

    def _kl_from_given(self) -> Tensor:
        divergences = []
        for name, rho in self.factors:
            mean, std = (self.get_buffer(f"prior_{part}_of_{name}") for part in ("mean", "std"))
            mu, sigma = self.get_parameter(name), softplus_sigma(self.get_parameter(rho))
            divergences.append(gaussian_kl_between(mu, sigma, mean, std).flatten(1).sum(1))
        return torch.stack(divergences).sum(0)

    @torch.no_grad()
    def second_moment(self) -> Tensor:
        """Mean of ``mu^2 + sigma^2`` over the entries of all factors, per task, ``[T]``."""
        squares = [(mu.square() + softplus_sigma(rho).square()).flatten(1) for mu, rho in self.posteriors()]
        return torch.cat(squares, dim=1).mean(1)

    def draw_noise(self, count: int) -> tuple[Tensor, ...]:
        """Standard normal noise for ``count`` draws of the factors, each ``[count, ...]``."""
        return tuple(mu.new_empty(count, *mu.shape[1:]).normal_() for mu, _ in self.posteriors())

    def draw_row_noise(self, shape: Sequence[int]) -> RowNoise:
        """Standard normal noise for one draw of the output per row; ``shape`` is ``[K, B]``."""
        return RowNoise(tuple(self.theta.new_empty(*shape, size).normal_() for size in self.row_noise_sizes()))

    def add_tasks(self, count: int = 1) -> range:
        """Append ``count`` fresh tasks, with the mean of the priors so far, and return their ids.

        Parameters are replaced by larger ones, so an optimiser must be given the new ones.
        """
        first = self.num_tasks
        stack_tasks(self, self.fresh_factors(count))
        self.log_prior_scale = torch.cat([self.log_prior_scale, self.log_prior_scale.mean().expand(count)])
        self.noise = None
        return range(first, self.num_tasks)

    def remove_tasks(self, task_ids: list[int]) -> None:
        """Drop tasks; those behind them move up. Parameters are replaced, as in :meth:`add_tasks`."""
        kept = unstack_tasks(self, [name for pair in self.factors for name in pair], task_ids, self.num_tasks)
        self.log_prior_scale = self.log_prior_scale[kept.to(self.log_prior_scale.device)]
        self.noise = None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, num_tasks={self.num_tasks}"


def summed_posterior_kl(layers: Sequence[VariationalLayer]) -> Tensor:
    """Sum over ``layers`` (at least one, none with a given prior) of their divergence: ``[T]`` nats."""
    posteriors = [(layer.log_prior_scale, posterior) for layer in layers for posterior in layer.posteriors()]
    return posterior_kl([posterior for _, posterior in posteriors], [scale for scale, _ in posteriors])


@torch.no_grad()
def residual_sigma(layer: VariationalLayer) -> Tensor:
    """Root mean square over entries of the standard deviation of each task's residual, ``[T]``."""
    variance = layer.task_weights().mean_variance()
    assert variance is not None
    return variance.sqrt().to(layer.theta.dtype)


def prior_sigma(layer: VariationalLayer) -> Tensor:
    """The same for residuals drawn from the prior, ``[T]``: ``p``, or ``s sqrt(r) p^2`` for a product."""
    if len(layer.factors) == 1:
        return layer.prior_scale
    rank = layer.posteriors()[0][0].shape[1]
    return layer.prior_scale.square() * (layer.scale * math.sqrt(rank))


@torch.no_grad()
def noise_to_weight(modules: Iterable[nn.Module]) -> tuple[float, float]:
    """Spread of the residuals over the root mean square of ``theta``: now, and at the prior.

    Means over all variational layers and tasks. Raises ValueError if there is none.
    """
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, VariationalLayer)]
    if not layers:
        raise ValueError("no layer has a posterior")
    size = [layer.theta.square().mean().sqrt() for layer in layers]
    now = torch.stack([residual_sigma(layer).mean() / rms for layer, rms in zip(layers, size, strict=True)])
    prior = torch.stack([prior_sigma(layer).mean() / rms for layer, rms in zip(layers, size, strict=True)])
    return float(now.mean()), float(prior.mean())
