"""VarShare: a shared weight plus, per task, a full-rank stochastic residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varshare_rl.nn.initial import INITIAL_RHO, linear_parameters, stack_tasks, unstack_tasks
from varshare_rl.nn.mlp import TaskMLP
from varshare_rl.nn.options import ArchitectureOptions, Posterior
from varshare_rl.nn.task_rows import TaskIds, task_rows
from varshare_rl.ops.gaussian import posterior_kl, softplus_sigma
from varshare_rl.ops.linear import linear


class VarShareLayer(nn.Module):
    """Linear layer whose weight for task ``i`` is ``W_i = theta + phi_i``, ``phi_i ~ N(mus[i], sigma[i]^2)``.

    In training mode outputs are drawn by local reparameterisation (Kingma, Salimans and Welling 2015):
    ``y ~ N(x (theta + mu)^T, (x^2)(sigma^2)^T)``, a fresh weight for every example. While noise is held (see
    :mod:`varshare_rl.nn.stochastic`) the weights themselves are drawn, once per task. In eval mode the means
    are used.

    Args:
        in_features: size of the input, ``F``.
        out_features: size of the output, ``G``.
        num_tasks: number of tasks, ``T``.
        prior_scale: standard deviation of the zero-mean Gaussian prior of every residual entry.
        bias: whether there is a shared bias.

    Attributes:
        theta: ``[G, F]``; bias: ``[G]`` or None; mus, rhos: ``[T, G, F]``; prior_scale.
    """

    per_task_parameters = ("mus", "rhos")
    spread_parameters = ("rhos",)

    def __init__(
        self, in_features: int, out_features: int, num_tasks: int, prior_scale: float = 1.0, bias: bool = True
    ) -> None:
        super().__init__()
        for name, size in (
            ("in_features", in_features), ("out_features", out_features), ("num_tasks", num_tasks),
        ):  # fmt: skip
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if prior_scale <= 0:
            raise ValueError(f"prior_scale is {prior_scale}; it must be positive")
        self.in_features, self.out_features = in_features, out_features
        self.prior_scale = prior_scale
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
        sampling = self.training and temperature > 0
        residual: Tensor = self.mus
        if sampling and self.noise is not None:
            residual = torch.addcmul(self.mus, softplus_sigma(self.rhos, temperature), self.noise[0])
        y = torch.baddbmm(linear(rows.x, self.theta, self.bias), rows.x, rows.select(residual).transpose(1, 2))
        if sampling and self.noise is None:
            variance = rows.select(softplus_sigma(self.rhos, temperature).square())
            spread = torch.bmm(rows.x.square(), variance.transpose(1, 2))
            y = y + spread.clamp_min(1e-16).sqrt() * torch.randn_like(y)
        return rows.restore(y)

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


@dataclass
class VarShare(ArchitectureOptions):
    """``network=varshare``: every linear layer a :class:`VarShareLayer`."""

    name: str = "varshare"

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> TaskMLP:
        """An MLP of full-rank VarShare layers for ``num_tasks`` tasks."""

        def layer(inputs: int, outputs: int) -> nn.Module:
            return VarShareLayer(inputs, outputs, num_tasks, posterior.prior_scale)

        sizes = [in_features, *self.hidden, out_features]
        return TaskMLP(sizes, layer, self.activation, posterior.temperature)
