"""VarShare: a shared weight plus, per task, a full-rank stochastic residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.nn.config import NetworkConfig, Posterior
from varshare_rl.nn.layer import INITIAL_RHO, AbsorptionMove, linear_parameters, plain_linear
from varshare_rl.nn.task_rows import TaskRows
from varshare_rl.nn.variational import VariationalLayer, begin_posterior
from varshare_rl.ops.gaussian import prior_nats, product_sigma, random_signs, softplus_sigma
from varshare_rl.ops.gradient_record import GradientRecord
from varshare_rl.ops.linear import full_rank_linear, linear
from varshare_rl.ops.task_weights import FullRankWeights
from varshare_rl.registry import register


class VarShareLayer(VariationalLayer):
    """Linear layer whose weight for task ``i`` is ``W_i = theta + phi_i``, ``phi_i ~ N(mus[i], sigma[i]^2)``.

    ``sigma = softplus(rho) * temperature``. The ``local`` estimator draws
    ``y ~ N(x (theta + mu)^T, (x^2)(sigma^2)^T)``.

    Args:
        in_features: size of the input, ``F``.
        out_features: size of the output, ``G``.
        num_tasks: number of tasks, ``T``.
        prior_scale: standard deviation of the zero-mean Gaussian prior of every residual entry, at the start.
        bias: give the layer a shared bias.
        estimator: of training passes, see :class:`VariationalLayer`.
        weight_samples: draws per task and pass.

    Attributes:
        theta: ``[G, F]``; bias: ``[G]`` or None; mus, rhos: ``[T, G, F]``; log_prior_scale: ``[T]``.
    """

    factors = (("mus", "rhos"),)
    mus: nn.Parameter
    rhos: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tasks: int,
        prior_scale: float = 1.0,
        bias: bool = True,
        estimator: str = "local",
        weight_samples: int = 1,
    ) -> None:
        super().__init__(in_features, out_features, num_tasks, prior_scale, estimator, weight_samples)
        self.theta, self.bias = linear_parameters(in_features, out_features, bias)
        self.register_factors(num_tasks)

    def shared_output(self, x: Tensor, record: GradientRecord | None = None) -> Tensor:
        return linear(x, self.theta, self.bias, record)

    def output(self, x: Tensor, factors: Sequence[Tensor], record: GradientRecord | None = None) -> Tensor:
        return full_rank_linear(x, self.theta, self.bias, factors[0], record)

    def local_output(
        self,
        x: Tensor,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        noise: Sequence[Tensor],
        record: GradientRecord | None = None,
    ) -> Tensor:
        mean = self.output(x, means, record)
        return torch.addcmul(mean, product_sigma(x, variances[0]), noise[0]).to(mean.dtype)

    def flipout_output(
        self, x: Tensor, means: Sequence[Tensor], deltas: Sequence[Tensor], record: GradientRecord | None = None
    ) -> Tensor:
        perturbed = torch.bmm(x * random_signs(x), deltas[0].transpose(1, 2))
        return torch.addcmul(self.output(x, means, record), perturbed, random_signs(perturbed))

    def task_weights(self) -> FullRankWeights:
        return FullRankWeights(self.theta, self.mus, softplus_sigma(self.rhos))

    def row_noise_sizes(self) -> tuple[int]:
        return (self.out_features,)

    def fresh_factors(self, num_tasks: int) -> dict[str, Tensor]:
        mus = self.theta.new_zeros(num_tasks, self.out_features, self.in_features)
        return {"mus": mus, "rhos": torch.full_like(mus, INITIAL_RHO)}

    def mean_linear(self, task: int) -> nn.Linear:
        return plain_linear(self.theta + self.mus[task], self.bias)

    def residual(self, task: int) -> Tensor:
        return self.mus[task]

    def unit_nats(self) -> Tensor:
        """A unit is the whole residual of a task, ``[T]``."""
        return prior_nats(self.mus, softplus_sigma(self.rhos), self.prior_scale.view(-1, 1, 1)).flatten(1).mean(1)

    def unit_snr(self) -> Tensor:
        """``|mu| / sigma``; a unit is a weight, ``[T, G, F]``."""
        return self.mus.abs() / softplus_sigma(self.rhos)

    def set_to_prior(self, kept: Tensor) -> None:
        kept = kept.view(len(kept), *(kept.shape[1:] or (1, 1)))
        self.mus.copy_(torch.where(kept, self.mus, 0.0))
        self.rhos.copy_(torch.where(kept, self.rhos, self.prior_rho))

    def absorption(self, rate: float) -> AbsorptionMove:
        """The move of the mean, which is exact."""
        mus = self.mus.double()
        precision = self.prior_scale.double().pow(-2)
        step = rate * mus.mean(0)
        after = mus - step
        before_cost, after_cost = (0.5 * precision * mean.flatten(1).square().sum(1) for mean in (mus, after))
        return AbsorptionMove(step, {"mus": after}, torch.zeros_like(precision), before_cost, after_cost)

    def output_variance(self, rows: TaskRows, temperature: float) -> Tensor:
        """``Var y_g = sum_f x_f^2 sigma_gf^2``."""
        return torch.bmm(rows.x.square(), self.variances(rows, temperature)[0].transpose(1, 2))

    def projected_variance(self, x: Tensor, slope: Tensor, temperature: float) -> Tensor:
        variance = torch.bmm(slope.square(), softplus_sigma(self.rhos, temperature).square())
        return (variance * x.square()).sum(-1)


@register("network", "varshare")
@dataclass
class VarShareConfig(NetworkConfig):
    """``network=varshare``: every linear layer a :class:`VarShareLayer`."""

    default_estimator: ClassVar[str | None] = "local"
    name: str = "varshare"

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        """A network of full-rank VarShare layers for ``num_tasks`` tasks."""

        def layer(inputs: int, outputs: int) -> nn.Module:
            made = VarShareLayer(
                inputs, outputs, num_tasks, posterior.factor_scale(inputs, None),
                estimator=posterior.estimator or "local", weight_samples=posterior.weight_samples,
            )  # fmt: skip
            return begin_posterior(made, posterior, None)

        return self.stack(in_features, out_features, layer, posterior.temperature)
