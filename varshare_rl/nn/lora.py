"""A shared weight plus, per task, a residual without noise: LoRA, and L2-soft with a penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.config import NetworkConfig, Posterior, check_layers, chosen_layers
from varshare_rl.nn.layer import INITIAL_MU_STD, TaskLayer, check_positive, linear_parameters, plain_linear
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.nn.task_rows import TaskIds, task_rows
from varshare_rl.ops.linear import linear, low_rank_linear
from varshare_rl.ops.low_rank import LowRank
from varshare_rl.ops.task_weights import FullRankWeights, LowRankWeights, TaskWeights
from varshare_rl.registry import register


class ResidualLayer(TaskLayer):
    """Linear layer whose weight for task ``i`` is ``theta + (alpha / rank) B_i A_i``, or ``theta + phi_i``.

    The low-rank form is that of LoRA (Hu et al. 2021) with a ``theta`` that is trained too, and the mean of
    VarShare-LoRA's; the full-rank form is the mean of VarShare's. Both start there as well: ``A ~ N(0, 0.01^2)``,
    ``B = 0`` and ``phi = 0``, so a fresh layer is the shared one.

    Args:
        in_features: size of the input, ``F``.
        out_features: size of the output, ``G``.
        num_tasks: number of tasks, ``T``.
        rank: rank of the residual; None for full rank.
        alpha: numerator of the scale of a low-rank residual; ``rank`` unless given, which makes the scale 1.
        dropout: on the input of a low-rank residual, in training.

    Attributes:
        theta: ``[G, F]``; bias: ``[G]``; factors_A: ``[T, rank, F]`` and factors_B: ``[T, G, rank]``, or
            residuals: ``[T, G, F]``; scale: ``alpha / rank``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tasks: int,
        rank: int | None = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features)
        check_positive(num_tasks=num_tasks, rank=1 if rank is None else rank)
        self.dropout = dropout
        self.rank = rank
        self.scale = 1.0 if rank is None or alpha is None else alpha / rank
        self.theta, self.bias = linear_parameters(in_features, out_features, bias=True)
        if rank is None:
            self.per_task_parameters = ("residuals",)
            self.residuals = nn.Parameter(torch.zeros(num_tasks, out_features, in_features))
        else:
            self.per_task_parameters, self.b_parameters = ("factors_A", "factors_B"), ("factors_B",)
            self.factors_A = nn.Parameter(torch.randn(num_tasks, rank, in_features) * INITIAL_MU_STD)
            self.factors_B = nn.Parameter(torch.zeros(num_tasks, out_features, rank))

    def forward(self, x: Tensor, task_id: TaskIds, temperature: float = 1.0) -> Tensor:
        """Apply each row's own task's weight; layouts and errors as in ``VarShareLoRALayer.forward``."""
        rows = task_rows(x, task_id, self.num_tasks)
        record = self.record(rows.ids)
        if self.rank is None:
            shared = linear(rows.x, self.theta, self.bias, record)
            return rows.restore(torch.baddbmm(shared, rows.x, rows.select(self.residuals).transpose(1, 2)))
        a, b = rows.select(self.factors_A), rows.select(self.factors_B)
        inner = F.dropout(rows.x, self.dropout) if self.dropout and self.training else None
        return rows.restore(low_rank_linear(rows.x, self.theta, self.bias, a, b, self.scale, record, inner))

    def task_weights(self) -> TaskWeights:
        """The weights of all tasks, see :mod:`varshare_rl.nn.sharing`."""
        if self.rank is None:
            return FullRankWeights(self.theta, self.residuals)
        return LowRankWeights(self.theta, self.factors_A, self.factors_B, self.scale)

    def mean_linear(self, task: int) -> nn.Linear:
        if self.rank is None:
            return plain_linear(self.theta + self.residuals[task], self.bias)
        return super().mean_linear(task)

    def shared_linear(self) -> nn.Linear:
        return super().shared_linear() if self.rank is None else plain_linear(self.theta, self.bias)

    def correction(self, task: int) -> LowRank | None:
        if self.rank is None:
            return None
        return LowRank(self.factors_A[task].detach().clone(), self.factors_B[task].detach().clone(), self.scale)

    def squared_norm(self) -> Tensor:
        """Sum of the squares of each task's own parameters, ``[T]``."""
        own = (self.get_parameter(name) for name in self.per_task_parameters)
        return torch.stack([parameter.square().flatten(1).sum(1) for parameter in own]).sum(0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"


class L2SoftLayer(ResidualLayer):
    """Layer with residuals whose tasks pay ``1/2 ||phi_i||^2 / prior_scale^2``, in nats.

    That is the mean's part of the divergence of a Gaussian posterior from the prior ``N(0, prior_scale^2)``:
    ``KL(N(mu, sigma^2) || p) = mu^2 / (2 prior_scale^2) + (what depends on sigma alone)``, summed over entries.
    Of a low-rank residual ``phi_i`` is both factors, as in VarShare-LoRA's divergence.

    Attributes:
        as of :class:`ResidualLayer`, and prior_scale.
    """

    penalized = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tasks: int,
        rank: int | None = 8,
        alpha: float | None = None,
        prior_scale: float = 1.0,
    ) -> None:
        super().__init__(in_features, out_features, num_tasks, rank, alpha)
        check_positive(prior_scale=prior_scale)
        self.prior_scale = prior_scale

    @property
    def penalized_size(self) -> int:
        """Number of penalised parameters of one task."""
        return sum(self.get_parameter(name)[0].numel() for name in self.per_task_parameters)

    def kl(self) -> Tensor:
        """``1/2 ||phi_i||^2 / prior_scale^2`` per task, ``[T]`` nats."""
        return self.squared_norm() * (0.5 / self.prior_scale**2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, prior_scale={self.prior_scale:g}"


@register("network", "l2_soft")
@dataclass
class L2SoftConfig(NetworkConfig):
    """``network=l2_soft``: every linear layer an :class:`L2SoftLayer`, the ablation of VarShare's noise.

    Residuals and start are those of ``varshare_lora`` (``rank=8``) or of ``varshare`` (``rank=null``), the
    penalty is the mean's part of their divergence, and ``elbo.kl_weight``, ``elbo.normalization`` and
    ``elbo.prior_scale`` act on it as on the whole, so one sweep serves all of them. What is missing is the noise
    and the price of precision. Active are ``theta`` and the task's own residual.
    """

    name: str = "l2_soft"
    rank: int | None = bounded(8, least=1)
    "Rank of the residuals; null: full rank."
    alpha: float | None = bounded(None, above=0)
    "Numerator of the residuals' scale `alpha / rank`; null: the rank, so that the scale is 1."

    def check(self, prefix: str) -> None:
        """Raise UserError for a scale without a rank."""
        if self.alpha is not None and self.rank is None:
            raise UserError(
                f"{prefix}alpha is {self.alpha} and scales a low-rank residual, but {prefix}rank is null; "
                "leave one of them out"
            )

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        """A network of penalised residual layers for ``num_tasks`` tasks."""

        def layer(inputs: int, outputs: int) -> nn.Module:
            scale = 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank
            prior_scale = posterior.factor_scale(inputs, self.rank, scale)
            return L2SoftLayer(inputs, outputs, num_tasks, self.rank, self.alpha, prior_scale)

        return self.stack(in_features, out_features, layer)


@register("network", "lora")
@dataclass
class LoRAConfig(NetworkConfig):
    """``network=lora``: every linear layer ``W_i = theta + (alpha / rank) B_i A_i`` (Hu et al. 2021).

    It is VarShare-LoRA without its posterior: the same residuals from the same start, neither sampled nor paid
    for. Deviation from the paper: ``theta`` is not a frozen, pretrained weight but is trained together with the
    residuals, and every task has its own. Active are ``theta`` and the task's own factors.
    """

    name: str = "lora"
    rank: int = bounded(8, least=1)
    "Rank of the residuals."
    alpha: float | None = bounded(None, above=0)
    "Numerator of the residuals' scale `alpha / rank`; null: the rank, so that the scale is 1."
    dropout: float = bounded(0.0, least=0, below=1)
    "Dropout on the residuals' input, in training."
    layers: Any = "all"
    "Layers with residuals: `all`, `last`, or a list of names (`[layers.0]`); the others are shared."

    def check(self, prefix: str) -> None:
        """Raise UserError for a choice of layers that is none."""
        check_layers(self.layers, prefix)

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        """A network of low-rank residual layers for ``num_tasks`` tasks."""

        def layer(inputs: int, outputs: int) -> nn.Module:
            return ResidualLayer(inputs, outputs, num_tasks, self.rank, self.alpha, self.dropout)

        network = self.stack(in_features, out_features, layer)
        paths = [path for path, module in network.named_modules() if isinstance(module, ResidualLayer)]
        for path in set(paths) - set(chosen_layers(paths, self.layers, "network.layers")):
            old = network.get_submodule(path)
            assert isinstance(old, ResidualLayer)
            assert isinstance(old.bias, nn.Parameter)
            new = SharedLayer(old.in_features, old.out_features)
            new.theta, new.bias = old.theta, old.bias
            network.set_submodule(path, new)
        return network
