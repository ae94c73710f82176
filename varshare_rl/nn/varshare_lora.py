"""VarShare-LoRA: a shared weight plus, per task, a stochastic low-rank residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.nn.initial import (
    INITIAL_MU_STD,
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
from varshare_rl.ops.linear import low_rank_linear
from varshare_rl.ops.recording import Recorder, Recording


class VarShareLoRALayer(nn.Module):
    """Linear layer whose weight for task ``i`` is ``W_i = theta + (alpha / rank) * B_i A_i``.

    ``A_i ~ N(mus_A[i], sigma_A[i]^2)`` and ``B_i ~ N(mus_B[i], sigma_B[i]^2)`` element by element, with
    ``sigma = softplus(rho) * temperature``. ``theta`` and ``bias`` are shared. ``mus_B`` starts at zero, so the
    mean weight of a fresh layer is ``theta``. In training mode the factors are sampled with the
    reparameterisation trick, one draw per task and forward pass (or the held one, see
    :mod:`varshare_rl.nn.stochastic`); in eval mode the means are used, which is exact for the mean weight:
    ``E[B A] = mu_B mu_A``, since the factors are independent. The residual ``[out, in]`` is never built.

    Args:
        in_features: size of the input, ``F``.
        out_features: size of the output, ``G``.
        num_tasks: number of tasks, ``T``.
        rank: rank of the residual.
        alpha: numerator of the scale; ``rank`` unless given, which makes the scale 1.
        prior_scale: standard deviation of the zero-mean Gaussian prior of every factor entry.
        bias: whether there is a shared bias.
        estimator: how training passes draw the weights, a key of :data:`ESTIMATORS`.

    Attributes:
        theta: ``[G, F]``; bias: ``[G]`` or None; mus_A, rhos_A: ``[T, rank, F]``; mus_B, rhos_B:
            ``[T, G, rank]``; scale: ``alpha / rank``; prior_scale.
    """

    per_task_parameters = ("mus_A", "rhos_A", "mus_B", "rhos_B")
    spread_parameters = ("rhos_A", "rhos_B")
    recorder: Recorder | None = None  # who wants theta's and bias's gradients per task

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tasks: int,
        rank: int = 8,
        alpha: float | None = None,
        prior_scale: float = 1.0,
        bias: bool = True,
        estimator: str = "weight",
    ) -> None:
        super().__init__()
        check_positive(
            in_features=in_features,
            out_features=out_features,
            num_tasks=num_tasks,
            rank=rank,
            prior_scale=prior_scale,
        )
        check_estimator(estimator, ESTIMATORS)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.scale = (rank if alpha is None else alpha) / rank
        self.prior_scale = prior_scale
        self.estimator = estimator
        self.noise: tuple[Tensor, ...] | None = None
        self.theta, self.bias = linear_parameters(in_features, out_features, bias)
        factors = self._fresh_factors(num_tasks)
        self.mus_A, self.rhos_A, self.mus_B, self.rhos_B = (nn.Parameter(factor) for factor in factors)

    @property
    def num_tasks(self) -> int:
        """Number of tasks, ``T``."""
        return self.mus_A.shape[0]

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
        estimate = ESTIMATORS[self.estimator] if self.training and temperature > 0 else mean_estimate
        return rows.restore(estimate(self, rows, temperature))

    def kl(self) -> Tensor:
        """``KL(q(A_i) || p) + KL(q(B_i) || p)`` in nats, per task, ``[T]``. Temperature does not enter."""
        kl_a = posterior_kl(self.mus_A, self.rhos_A, self.prior_scale)
        return kl_a + posterior_kl(self.mus_B, self.rhos_B, self.prior_scale)

    def draw_noise(self) -> tuple[Tensor, Tensor]:
        """Standard normal noise for ``(A, B)``: ``[T, rank, F]`` and ``[T, G, rank]``."""
        return torch.randn_like(self.mus_A), torch.randn_like(self.mus_B)

    def add_tasks(self, count: int = 1) -> range:
        """Append ``count`` fresh tasks and return their ids.

        Parameters are replaced by larger ones, so an optimiser must be given the new ones.
        """
        first = self.num_tasks
        fresh = self._fresh_factors(count)
        stack_tasks(self, dict(zip(("mus_A", "rhos_A", "mus_B", "rhos_B"), fresh, strict=True)))
        self.noise = None
        return range(first, self.num_tasks)

    def remove_tasks(self, task_ids: list[int]) -> None:
        """Drop tasks; those behind them move up. Parameters are replaced, as in :meth:`add_tasks`."""
        unstack_tasks(self, self.per_task_parameters, task_ids, self.num_tasks)
        self.noise = None

    def _fresh_factors(self, num_tasks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        like = self.theta
        mus_a = torch.randn(num_tasks, self.rank, self.in_features, device=like.device, dtype=like.dtype)
        mus_b = like.new_zeros(num_tasks, self.out_features, self.rank)
        rhos = (torch.full_like(mus_a, INITIAL_RHO), torch.full_like(mus_b, INITIAL_RHO))
        return mus_a * INITIAL_MU_STD, rhos[0], mus_b, rhos[1]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_tasks={self.num_tasks}, "
            f"rank={self.rank}, scale={self.scale:g}, prior_scale={self.prior_scale:g}"
        )


def mean_estimate(layer: VarShareLoRALayer, rows: TaskRows, temperature: float) -> Tensor:
    """The output of the mean weight."""
    return _apply(layer, rows, layer.mus_A, layer.mus_B)


def weight_estimate(layer: VarShareLoRALayer, rows: TaskRows, temperature: float) -> Tensor:
    """One reparameterised draw of ``A`` and ``B`` per task, with the held noise if there is any."""
    noise_a, noise_b = layer.draw_noise() if layer.noise is None else layer.noise
    factor_a = torch.addcmul(layer.mus_A, softplus_sigma(layer.rhos_A, temperature), noise_a)
    factor_b = torch.addcmul(layer.mus_B, softplus_sigma(layer.rhos_B, temperature), noise_b)
    return _apply(layer, rows, factor_a, factor_b)


def _apply(layer: VarShareLoRALayer, rows: TaskRows, a: Tensor, b: Tensor) -> Tensor:
    record = None if layer.recorder is None else Recording(layer.recorder, layer.theta, layer.bias)
    return low_rank_linear(rows.x, layer.theta, layer.bias, rows.select(a), rows.select(b), layer.scale, record)


#: An estimator maps the rows ``[K, B, F]`` with their tasks' weights to ``[K, B, G]``.
Estimator = Callable[[VarShareLoRALayer, TaskRows, float], Tensor]

#: How a training pass draws the weights.
ESTIMATORS: dict[str, Estimator] = {"weight": weight_estimate, "mean": mean_estimate}


@dataclass
class VarShareLoRA(ArchitectureOptions):
    """``network=varshare_lora``: every linear layer a :class:`VarShareLoRALayer`."""

    estimators: ClassVar[tuple[str, ...]] = tuple(ESTIMATORS)
    name: str = "varshare_lora"
    rank: int = 8
    alpha: float | None = None

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> TaskMLP:
        """An MLP of VarShare-LoRA layers for ``num_tasks`` tasks."""

        def layer(inputs: int, outputs: int) -> nn.Module:
            return VarShareLoRALayer(
                inputs, outputs, num_tasks, self.rank, self.alpha, posterior.prior_scale,
                estimator=posterior.estimator or "weight",
            )  # fmt: skip

        sizes = [in_features, *self.hidden, out_features]
        return TaskMLP(sizes, layer, self.activation, posterior.temperature, self.layer_norm)
