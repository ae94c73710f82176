"""VarShare: a shared weight plus, per task, a full-rank stochastic residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.nn.initial import (
    INITIAL_RHO,
    check_estimator,
    check_positive,
    linear_parameters,
    stack_tasks,
    unstack_tasks,
)
from varshare_rl.nn.mlp import TaskMLP
from varshare_rl.nn.options import ArchitectureOptions, Posterior
from varshare_rl.nn.task_rows import TaskIds, TaskRows, task_rows
from varshare_rl.ops.gaussian import posterior_kl, softplus_sigma
from varshare_rl.ops.linear import linear
from varshare_rl.ops.recording import Recorder, Recording


class VarShareLayer(nn.Module):
    """Linear layer whose weight for task ``i`` is ``W_i = theta + phi_i``, ``phi_i ~ N(mus[i], sigma[i]^2)``.

    In training mode outputs are drawn by local reparameterisation (Kingma, Salimans and Welling 2015), a fresh
    weight for every example, unless another ``estimator`` is chosen:
    ``y ~ N(x (theta + mu)^T, (x^2)(sigma^2)^T)``. While noise is held (see :mod:`varshare_rl.nn.stochastic`) the
    weights themselves are drawn, once per task. In eval mode the means are used.

    Args:
        in_features: size of the input, ``F``.
        out_features: size of the output, ``G``.
        num_tasks: number of tasks, ``T``.
        prior_scale: standard deviation of the zero-mean Gaussian prior of every residual entry.
        bias: whether there is a shared bias.
        estimator: how training passes draw the weights, a key of :data:`ESTIMATORS`.

    Attributes:
        theta: ``[G, F]``; bias: ``[G]`` or None; mus, rhos: ``[T, G, F]``; prior_scale.
    """

    per_task_parameters = ("mus", "rhos")
    spread_parameters = ("rhos",)
    recorder: Recorder | None = None  # who wants theta's and bias's gradients per task

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tasks: int,
        prior_scale: float = 1.0,
        bias: bool = True,
        estimator: str = "local",
    ) -> None:
        super().__init__()
        check_positive(
            in_features=in_features, out_features=out_features, num_tasks=num_tasks, prior_scale=prior_scale
        )
        check_estimator(estimator, ESTIMATORS)
        self.in_features, self.out_features = in_features, out_features
        self.prior_scale = prior_scale
        self.estimator = estimator
        self.noise: tuple[Tensor, ...] | None = None
        self.theta, self.bias = linear_parameters(in_features, out_features, bias)
        self.mus, self.rhos = (nn.Parameter(fresh) for fresh in self._fresh_residual(num_tasks))

    @property
    def num_tasks(self) -> int:
        """Number of tasks, ``T``."""
        return self.mus.shape[0]

    def forward(self, x: Tensor, task_id: TaskIds, temperature: float = 1.0) -> Tensor:
        """Apply each row's own task's weights; layouts and errors as in ``VarShareLoRALayer.forward``."""
        rows = task_rows(x, task_id, self.num_tasks)
        estimate = ESTIMATORS[self.estimator] if self.training and temperature > 0 else mean_estimate
        return rows.restore(estimate(self, rows, temperature))

    def kl(self) -> Tensor:
        """``KL(q(phi_i) || p)`` in nats, per task, ``[T]``. Temperature does not enter."""
        return posterior_kl(self.mus, self.rhos, self.prior_scale)

    def draw_noise(self) -> tuple[Tensor]:
        """Standard normal noise for the residual, ``[T, G, F]``."""
        return (torch.randn_like(self.mus),)

    def add_tasks(self, count: int = 1) -> range:
        """Append ``count`` fresh tasks and return their ids. Parameters are replaced by larger ones."""
        first = self.num_tasks
        stack_tasks(self, dict(zip(self.per_task_parameters, self._fresh_residual(count), strict=True)))
        self.noise = None
        return range(first, self.num_tasks)

    def remove_tasks(self, task_ids: list[int]) -> None:
        """Drop tasks; those behind them move up. Parameters are replaced."""
        unstack_tasks(self, self.per_task_parameters, task_ids, self.num_tasks)
        self.noise = None

    def _fresh_residual(self, num_tasks: int) -> tuple[Tensor, Tensor]:
        mus = self.theta.new_zeros(num_tasks, self.out_features, self.in_features)
        return mus, torch.full_like(mus, INITIAL_RHO)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_tasks={self.num_tasks}, "
            f"prior_scale={self.prior_scale:g}"
        )


def mean_estimate(layer: VarShareLayer, rows: TaskRows, temperature: float) -> Tensor:
    """The output of the mean weight."""
    return _apply(layer, rows, layer.mus)


def weight_estimate(layer: VarShareLayer, rows: TaskRows, temperature: float) -> Tensor:
    """One reparameterised draw of the residual per task, with the held noise if there is any."""
    noise = layer.draw_noise() if layer.noise is None else layer.noise
    return _apply(layer, rows, torch.addcmul(layer.mus, softplus_sigma(layer.rhos, temperature), noise[0]))


def local_estimate(layer: VarShareLayer, rows: TaskRows, temperature: float) -> Tensor:
    """One draw of the output per example; held noise is a draw of the weights and takes precedence."""
    if layer.noise is not None:
        return weight_estimate(layer, rows, temperature)
    y = mean_estimate(layer, rows, temperature)
    variance = rows.select(softplus_sigma(layer.rhos, temperature).square())
    spread = torch.bmm(rows.x.square(), variance.transpose(1, 2))
    return y + spread.clamp_min(1e-16).sqrt() * torch.randn_like(y)


def _apply(layer: VarShareLayer, rows: TaskRows, residual: Tensor) -> Tensor:
    record = None if layer.recorder is None else Recording(layer.recorder, layer.theta, layer.bias)
    shared = linear(rows.x, layer.theta, layer.bias, record)
    return torch.baddbmm(shared, rows.x, rows.select(residual).transpose(1, 2))


#: An estimator maps the rows ``[K, B, F]`` with their tasks' weights to ``[K, B, G]``.
Estimator = Callable[[VarShareLayer, TaskRows, float], Tensor]

#: How a training pass draws the weights.
ESTIMATORS: dict[str, Estimator] = {"local": local_estimate, "weight": weight_estimate, "mean": mean_estimate}


@dataclass
class VarShare(ArchitectureOptions):
    """``network=varshare``: every linear layer a :class:`VarShareLayer`."""

    estimators: ClassVar[tuple[str, ...]] = tuple(ESTIMATORS)
    name: str = "varshare"

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> TaskMLP:
        """An MLP of full-rank VarShare layers for ``num_tasks`` tasks."""

        def layer(inputs: int, outputs: int) -> nn.Module:
            estimator = posterior.estimator or "local"
            return VarShareLayer(inputs, outputs, num_tasks, posterior.prior_scale, estimator=estimator)

        sizes = [in_features, *self.hidden, out_features]
        return TaskMLP(sizes, layer, self.activation, posterior.temperature, self.layer_norm)
