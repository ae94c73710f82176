"""VarShare-LoRA: a shared weight plus, per task, a stochastic low-rank residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.fields import bounded
from varshare_rl.nn.config import NetworkConfig, Posterior
from varshare_rl.nn.initial import INITIAL_MU_STD, INITIAL_RHO, check_positive, linear_parameters
from varshare_rl.nn.variational import VariationalLayer
from varshare_rl.ops.gaussian import drawn_product, random_signs, softplus_sigma
from varshare_rl.ops.gradient_record import GradientRecord
from varshare_rl.ops.linear import linear, low_rank_linear
from varshare_rl.ops.task_weights import LowRankWeights
from varshare_rl.registry import register


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
        bias: whether there is a shared bias.
        estimator: how training passes draw the weights, see :class:`VariationalLayer`.
        weight_samples: draws per task and pass.

    Attributes:
        theta: ``[G, F]``; bias: ``[G]`` or None; mus_A, rhos_A: ``[T, rank, F]``; mus_B, rhos_B:
            ``[T, G, rank]``; scale: ``alpha / rank``; log_prior_scale: ``[T]``.
    """

    factors = (("mus_A", "rhos_A"), ("mus_B", "rhos_B"))
    per_task_parameters = ("mus_A", "rhos_A", "mus_B", "rhos_B")
    rho_parameters = ("rhos_A", "rhos_B")
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
        for name, value in self.fresh_factors(num_tasks).items():
            self.register_parameter(name, nn.Parameter(value))

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
        (mean_a, mean_b), (variance_a, variance_b), (noise_z, noise_y) = means, variances, noise
        z = drawn_product(x, mean_a, variance_a, noise_z)
        return torch.add(
            self.shared_output(x, record), drawn_product(z, mean_b, variance_b, noise_y), alpha=self.scale
        )

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
            return VarShareLoRALayer(
                inputs, outputs, num_tasks, self.rank, self.alpha, posterior.prior_scale,
                estimator=posterior.estimator or "weight", weight_samples=posterior.weight_samples,
            )  # fmt: skip

        return self.stack(in_features, out_features, layer, posterior.temperature)
