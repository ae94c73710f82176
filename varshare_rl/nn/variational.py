"""Linear layers with a Gaussian posterior over weights per task, and how far their residuals scatter."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from varshare_rl.nn.config import Posterior, PosteriorStart
from varshare_rl.nn.layer import TaskLayer, TaskModule, check_positive
from varshare_rl.nn.stochastic import GaussianFactors, RowNoise, WeightNoise
from varshare_rl.nn.task_rows import TaskIds, TaskRows, task_rows
from varshare_rl.ops.gaussian import inverse_softplus, posterior_kl, softplus_sigma
from varshare_rl.ops.gradient_record import GradientRecord
from varshare_rl.ops.task_weights import TaskWeights


class Estimator(Enum):
    """Ways that a training pass draws the weights when no noise is held, see :class:`VariationalLayer`."""

    weight = "weight"
    local = "local"
    flipout = "flipout"
    mean = "mean"


#: Their names.
ESTIMATORS = tuple(estimator.value for estimator in Estimator)


class VariationalLayer(GaussianFactors, TaskLayer):
    """Linear layer whose weight for task ``i`` is a shared ``theta`` plus a residual with a Gaussian posterior.

    The residual is made of the layer's factors (:class:`~varshare_rl.nn.stochastic.GaussianFactors`). In eval mode,
    or at temperature 0, their means are used. In training mode they are drawn with the reparameterisation trick:
    with the noise that is held, or else anew at each pass, as the ``estimator`` says:

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
        has_given_prior: see :meth:`give_prior`.
        home_prior_scale: the prior's standard deviation at the start; prior_unit: ``u, k`` of :meth:`scale_prior`.
        scale: factor on the residual that the factors make.
    """

    per_task_buffers = ("log_prior_scale",)
    theta: nn.Parameter
    bias: nn.Parameter | None
    log_prior_scale: Tensor
    scale: float = 1.0
    has_given_prior = False
    prior_unit: tuple[float, float] = (1.0, 1.0)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tasks: int,
        prior_scale: float,
        estimator: str,
        weight_samples: int,
    ) -> None:
        super().__init__(in_features, out_features)
        check_positive(num_tasks=num_tasks, prior_scale=prior_scale, weight_samples=weight_samples)
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}; there are {', '.join(ESTIMATORS)}")
        self.estimator, self.weight_samples = estimator, weight_samples
        self.home_prior_scale = float(prior_scale)
        self.register_buffer("log_prior_scale", torch.full((num_tasks,), float(prior_scale)).log())

    @property
    def prior_scale(self) -> Tensor:
        """Standard deviation of each task's prior, ``[T]``."""
        return self.log_prior_scale.exp()

    @torch.no_grad()
    def scale_prior(self, scales: Tensor) -> None:
        """Give the tasks' priors the standard deviations ``(u scales)^k``: ``scales [T]`` in the layer's units."""
        unit, power = self.prior_unit
        self.log_prior_scale.copy_((unit * scales).log() * power)

    @torch.no_grad()
    def start_at_prior(self) -> None:
        """Give all posteriors the standard deviations of their priors."""
        for _, rhos in self.posteriors():
            rhos.copy_(self.prior_rho.expand_as(rhos))

    @property
    def prior_rho(self) -> Tensor:
        """``rho`` of the prior, ``[T, 1, 1]``."""
        return inverse_softplus(self.prior_scale.double()).to(self.prior_scale.dtype).view(-1, 1, 1)

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
            return self.shared_output(rows.x, self.record(rows.ids))
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
        drawn = self.drawn(noise, temperature, split.ids)
        return rows.merge(self.output(split.x, drawn, self.record(split.ids)))

    def _mean(self, rows: TaskRows) -> Tensor:
        return self.output(rows.x, self.means(rows), self.record(rows.ids))

    def _drawn(self, rows: TaskRows, temperature: float, held: WeightNoise) -> Tensor:
        """With held draws: one per task, or one per group of rows."""
        if held.index is None:
            drawn = self.drawn(held.values, temperature)
            return self.output(rows.x, [rows.select(weight) for weight in drawn], self.record(rows.ids))
        grouped, drawn = self.drawn_by_index(rows, held, temperature)
        return grouped.restore(self.output(grouped.x, drawn)).view(*rows.x.shape[:2], -1)

    def _local(self, rows: TaskRows, temperature: float, noise: RowNoise) -> Tensor:
        means, variances = self.means(rows), self.variances(rows, temperature)
        return self.local_output(rows.x, means, variances, noise.values, self.record(rows.ids))

    def _flipout(self, rows: TaskRows, temperature: float, noise: Sequence[Tensor]) -> Tensor:
        means = self.means(rows)
        sigmas = [rows.select(softplus_sigma(rho, temperature)) for _, rho in self.posteriors()]
        deltas = [sigma * epsilon for sigma, epsilon in zip(sigmas, noise, strict=True)]
        return self.flipout_output(rows.x, means, deltas, self.record(rows.ids))

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
        """The mean weights of all tasks and their standard deviations, see :mod:`varshare_rl.nn.sharing`."""

    def kl(self) -> Tensor:
        """Divergence of the posteriors from their priors, in nats per task, ``[T]``. No temperature in it."""
        return super().kl() if self.has_given_prior else summed_posterior_kl([self])

    def give_prior(self, prior: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Have :meth:`kl` measure from ``N(mean, std^2)`` entry by entry in place of ``N(0, prior_scale^2)``.

        ``prior`` has mean and standard deviation of every factor, in shapes that broadcast to ``[T, ...]``. They
        are buffers that follow the layer to its device but are not in its state dict: a prior is given again.
        """
        for (name, _), pair in zip(self.factors, prior, strict=True):
            for part, value in zip(("mean", "std"), pair, strict=True):
                self.register_buffer(f"prior_{part}_of_{name}", value.to(self.theta), persistent=False)
        self.has_given_prior = True

    def prior(self) -> list[tuple[Tensor, Tensor]]:
        """The given prior's parts, or 0 and each task's ``prior_scale``."""
        if not self.has_given_prior:
            scale = self.prior_scale.view(-1, 1, 1)
            return [(torch.zeros_like(scale), scale)] * len(self.factors)
        names = [name for name, _ in self.factors]
        return [
            (self.get_buffer(f"prior_mean_of_{name}"), self.get_buffer(f"prior_std_of_{name}")) for name in names
        ]

    def add_tasks(self, count: int = 1) -> range:
        """Append ``count`` fresh tasks, with the mean of the priors so far, and return their ids.

        Parameters are replaced by larger ones, so an optimiser must be given the new ones.
        """
        added = super().add_tasks(count)
        self.log_prior_scale = torch.cat([self.log_prior_scale, self.log_prior_scale.mean().expand(count)])
        return added


def stochastic_layers(module: nn.Module) -> Iterator[tuple[str, VariationalLayer]]:
    """All layers inside ``module`` whose prior's scale can be moved, with their dotted names, in order."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, VariationalLayer))


def summed_posterior_kl(layers: Sequence[VariationalLayer]) -> Tensor:
    """Sum over ``layers`` (at least one, none with a given prior) of their divergence: ``[T]`` nats."""
    posteriors = [(layer.log_prior_scale, posterior) for layer in layers for posterior in layer.posteriors()]
    return posterior_kl([posterior for _, posterior in posteriors], [scale for scale, _ in posteriors])


def summed_kl(layers: Sequence[TaskModule]) -> Tensor:
    """Sum of what the weights per task of ``layers``, at least one, cost: ``[T]`` nats."""
    together = [layer for layer in layers if isinstance(layer, VariationalLayer) and not layer.has_given_prior]
    costs = [layer.kl() for layer in layers if layer not in together]
    if together:
        costs.append(summed_posterior_kl(together))
    return costs[0] if len(costs) == 1 else torch.stack(costs).sum(0)


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
    """Standard deviation of the residuals over the root mean square of ``theta``: now, and at the prior.

    Means over all variational layers and tasks. Raises ValueError if there is none.
    """
    layers = [layer for module in modules for _, layer in stochastic_layers(module)]
    if not layers:
        raise ValueError("no layer has a posterior")
    size = [layer.theta.square().mean().sqrt() for layer in layers]
    now = torch.stack([residual_sigma(layer).mean() / rms for layer, rms in zip(layers, size, strict=True)])
    prior = torch.stack([prior_sigma(layer).mean() / rms for layer, rms in zip(layers, size, strict=True)])
    return float(now.mean()), float(prior.mean())


def begin_posterior(layer: VariationalLayer, posterior: Posterior, rank: int | None) -> VariationalLayer:
    """Have a fresh layer know its prior's units, and start as ``posterior`` says."""
    layer.prior_unit = posterior.unit(layer.in_features, rank, layer.scale)
    if posterior.start is PosteriorStart.prior:
        layer.start_at_prior()
    return layer
