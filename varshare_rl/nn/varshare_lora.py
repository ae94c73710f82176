"""VarShare-LoRA: a shared weight plus, per task, a stochastic low-rank residual."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.fields import bounded
from varshare_rl.nn.config import NetworkConfig, Posterior
from varshare_rl.nn.layer import (
    INITIAL_MU_STD,
    INITIAL_RHO,
    AbsorptionMove,
    check_positive,
    linear_parameters,
    plain_linear,
)
from varshare_rl.nn.task_rows import TaskRows
from varshare_rl.nn.variational import VariationalLayer, begin_posterior
from varshare_rl.ops.gaussian import drawn_low_rank, prior_nats, random_signs, softplus_sigma
from varshare_rl.ops.gradient_record import GradientRecord
from varshare_rl.ops.linear import linear, low_rank_linear
from varshare_rl.ops.low_rank import LowRank, aligned, balanced, decompose, shared_part
from varshare_rl.ops.task_weights import LowRankWeights
from varshare_rl.registry import register

#: Singular values below this share of the residual are rounding.
_NOTHING = 1e-7


class VarShareLoRALayer(VariationalLayer):
    """Linear layer whose weight for task ``i`` is ``W_i = theta + (alpha / rank) * B_i A_i``.

    ``A_i ~ N(mus_A[i], sigma_A[i]^2)`` and ``B_i ~ N(mus_B[i], sigma_B[i]^2)`` element by element, with
    ``sigma = softplus(rho) * temperature``. ``theta`` and ``bias`` are shared. ``mus_B`` starts at zero, so the
    mean weight of a fresh layer is ``theta``. The mean output is exact: ``E[B A] = mu_B mu_A``, since the factors
    are independent. The residual ``[out, in]`` is never built.

    The ``local`` estimator is exact for a fresh ``(A, B)`` at every row, in two stages, because the rows of a
    factor are independent: ``z ~ N(x mu_A^T, (x^2)(sigma_A^2)^T)``, and given ``z`` the residual's output is
    ``N(z mu_B^T, (z^2)(sigma_B^2)^T)``.

    Args:
        in_features: size of the input, ``F``.
        out_features: size of the output, ``G``.
        num_tasks: number of tasks, ``T``.
        rank: rank of the residual.
        alpha: numerator of the scale; ``rank`` unless given, which makes the scale 1.
        prior_scale: standard deviation of the zero-mean Gaussian prior of every factor entry, at the start.
        bias: give the layer a shared bias.
        estimator: of training passes, see :class:`VariationalLayer`.
        weight_samples: draws per task and pass.

    Attributes:
        theta: ``[G, F]``; bias: ``[G]`` or None; mus_A, rhos_A: ``[T, rank, F]``; mus_B, rhos_B:
            ``[T, G, rank]``; scale: ``alpha / rank``; log_prior_scale: ``[T]``.
    """

    factors = (("mus_A", "rhos_A"), ("mus_B", "rhos_B"))
    b_parameters = ("mus_B",)
    mus_A: nn.Parameter
    rhos_A: nn.Parameter
    mus_B: nn.Parameter
    rhos_B: nn.Parameter

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
        weight_samples: int = 1,
    ) -> None:
        super().__init__(in_features, out_features, num_tasks, prior_scale, estimator, weight_samples)
        check_positive(rank=rank)
        self.rank = rank
        self.scale = (rank if alpha is None else alpha) / rank
        self.theta, self.bias = linear_parameters(in_features, out_features, bias)
        self.register_factors(num_tasks)

    def shared_output(self, x: Tensor, record: GradientRecord | None = None) -> Tensor:
        return linear(x, self.theta, self.bias, record)

    def output(self, x: Tensor, factors: Sequence[Tensor], record: GradientRecord | None = None) -> Tensor:
        a, b = factors
        return low_rank_linear(x, self.theta, self.bias, a, b, self.scale, record)

    def local_output(
        self,
        x: Tensor,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        noise: Sequence[Tensor],
        record: GradientRecord | None = None,
    ) -> Tensor:
        shared = self.shared_output(x, record)
        return torch.add(shared, drawn_low_rank(x, means, variances, noise), alpha=self.scale).to(shared.dtype)

    def flipout_output(
        self, x: Tensor, means: Sequence[Tensor], deltas: Sequence[Tensor], record: GradientRecord | None = None
    ) -> Tensor:
        (mean_a, mean_b), (delta_a, delta_b) = means, deltas
        z = _flipped(x, mean_a, delta_a)
        return torch.add(self.shared_output(x, record), _flipped(z, mean_b, delta_b), alpha=self.scale)

    def task_weights(self) -> LowRankWeights:
        sigmas = (softplus_sigma(self.rhos_A), softplus_sigma(self.rhos_B))
        return LowRankWeights(self.theta, self.mus_A, self.mus_B, self.scale, *sigmas)

    def row_noise_sizes(self) -> tuple[int, int]:
        return self.rank, self.out_features

    def fresh_factors(self, num_tasks: int) -> dict[str, Tensor]:
        like = self.theta
        mus_a = torch.randn(num_tasks, self.rank, self.in_features, device=like.device, dtype=like.dtype)
        mus_b = like.new_zeros(num_tasks, self.out_features, self.rank)
        return {
            "mus_A": mus_a * INITIAL_MU_STD,
            "rhos_A": torch.full_like(mus_a, INITIAL_RHO),
            "mus_B": mus_b,
            "rhos_B": torch.full_like(mus_b, INITIAL_RHO),
        }

    def shared_linear(self) -> nn.Linear:
        return plain_linear(self.theta, self.bias)

    def correction(self, task: int) -> LowRank:
        return LowRank(self.mus_A[task].detach().clone(), self.mus_B[task].detach().clone(), self.scale)

    def task_rho(self, task: int) -> dict[str, Tensor]:
        rhos = {"rho_A": self.rhos_A[task].detach().clone(), "rho_B": self.rhos_B[task].detach().clone()}
        return {**rhos, "prior_scale": self.prior_scale[task]}

    def unit_nats(self) -> Tensor:
        """A unit is component ``k``, row ``k`` of ``A`` and column ``k`` of ``B``: ``[T, rank]``."""
        prior = self.prior_scale.view(-1, 1, 1)
        rows = prior_nats(self.mus_A, softplus_sigma(self.rhos_A), prior).sum(2)
        columns = prior_nats(self.mus_B, softplus_sigma(self.rhos_B), prior).sum(1)
        return (rows + columns) / (self.in_features + self.out_features)

    def unit_snr(self) -> Tensor:
        """Signal-to-noise of the components' products, ``[T, rank]``."""
        mean_a, mean_b = self.mus_A.square().sum(2), self.mus_B.square().sum(1)
        variance_a = softplus_sigma(self.rhos_A).square().sum(2)
        variance_b = softplus_sigma(self.rhos_B).square().sum(1)
        noise = mean_b * variance_a + variance_b * mean_a + variance_b * variance_a
        return (mean_a * mean_b / noise).sqrt()

    def set_to_prior(self, kept: Tensor) -> None:
        for (mus, rhos), keep in zip(self.posteriors(), (kept.unsqueeze(2), kept.unsqueeze(1)), strict=True):
            mus.copy_(torch.where(keep, mus, 0.0))
            rhos.copy_(torch.where(keep, rhos, self.prior_rho))

    def absorption(self, rate: float) -> AbsorptionMove:
        """The move of rank ``r``; the gradient of a factor scales with the other factor, which changes."""
        precision = self.prior_scale.double().pow(-2)
        a, b, rank = self.mus_A.double(), self.mus_B.double(), self.rank
        left, right = shared_part(a, b, rank)
        left = rate * left
        difference_a = torch.cat([a, right.expand(len(a), -1, -1)], 1)  # [T, r + q, F]
        difference_b = torch.cat([b, -left.expand(len(b), -1, -1)], 2)  # [T, G, r + q]
        u, values, vh = decompose(difference_a, difference_b)
        nuclear_before = decompose(a, b)[1]
        size = torch.maximum(nuclear_before.norm(dim=1), values.norm(dim=1))
        lost = values[:, rank:].norm(dim=1)
        short = INITIAL_MU_STD * math.sqrt(self.in_features)
        new_a, new_b = aligned(*balanced(u, values, vh, rank, _NOTHING * size, short), a, b)
        return AbsorptionMove(
            step=self.scale * (left @ right),
            means={"mus_A": new_a, "mus_B": new_b},
            error=lost / size.clamp_min(torch.finfo(torch.float64).tiny),
            cost_before=precision * nuclear_before.sum(1),  # (|A|^2 + |B|^2) / (2 p^2) of balanced factors
            cost_after=precision * values[:, :rank].sum(1),
            rescaled=self.per_task_parameters,
        )

    def output_variance(self, rows: TaskRows, temperature: float) -> Tensor:
        """``Var y_g = s^2 sum_k [mu_B,gk^2 Var z_k + sigma_B,gk^2 E z_k^2]`` with ``z = A x``, in two stages."""
        (mean_a, mean_b), (variance_a, variance_b) = self.means(rows), self.variances(rows, temperature)
        z = torch.bmm(rows.x, mean_a.transpose(1, 2))
        z_variance = torch.bmm(rows.x.square(), variance_a.transpose(1, 2))
        variance = torch.bmm(z_variance, mean_b.square().transpose(1, 2))
        second_moment = z_variance + z.square()
        return torch.baddbmm(variance, second_moment, variance_b.transpose(1, 2)) * self.scale**2

    def projected_variance(self, x: Tensor, slope: Tensor, temperature: float) -> Tensor:
        variance_a, variance_b = (softplus_sigma(rho, temperature).square() for _, rho in self.posteriors())
        z = torch.bmm(x, self.mus_A.transpose(1, 2))
        z_variance = torch.bmm(x.square(), variance_a.transpose(1, 2))
        along = torch.bmm(slope, self.mus_B).square()  # [T, B, r]
        across = torch.bmm(slope.square(), variance_b)
        return (along * z_variance + across * (z_variance + z.square())).sum(-1) * self.scale**2

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"


def _flipped(x: Tensor, mean: Tensor, delta: Tensor) -> Tensor:
    """``x (mean + s delta t^T)^T`` with random signs ``s``, ``t`` at every row."""
    perturbed = torch.bmm(x * random_signs(x), delta.transpose(1, 2))
    return torch.addcmul(torch.bmm(x, mean.transpose(1, 2)), perturbed, random_signs(perturbed))


@register("network", "varshare_lora")
@dataclass
class VarShareLoRAConfig(NetworkConfig):
    """``network=varshare_lora``: every linear layer a :class:`VarShareLoRALayer`."""

    default_estimator: ClassVar[str | None] = "weight"
    name: str = "varshare_lora"
    rank: int = bounded(8, least=1)
    "Rank of the residuals."
    alpha: float | None = bounded(None, above=0)
    "Numerator of the residuals' scale `alpha / rank`; null: the rank, so that the scale is 1."

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        """A network of VarShare-LoRA layers for ``num_tasks`` tasks."""

        def layer(inputs: int, outputs: int) -> nn.Module:
            scale = 1.0 if self.alpha is None else self.alpha / self.rank
            made = VarShareLoRALayer(
                inputs, outputs, num_tasks, self.rank, self.alpha,
                posterior.factor_scale(inputs, self.rank, scale),
                estimator=posterior.estimator or "weight", weight_samples=posterior.weight_samples,
            )  # fmt: skip
            return begin_posterior(made, posterior, self.rank)

        return self.stack(in_features, out_features, layer, posterior.temperature)
