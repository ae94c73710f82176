"""The weighted KL penalty of the negative ELBO."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor, nn

from varshare_rl.nn.options import Posterior
from varshare_rl.nn.parameters import total_kl
from varshare_rl.optim.absorption import AbsorbOptions


class KLNormalization(Enum):
    """What ``n_i``, the divisor of a task's divergence, is."""

    data = "data"  # transitions of this task that the loss averages over: kl_weight = 1 is the plain ELBO
    parameters = "parameters"  # parameters of this task's posterior
    none = "none"  # 1


@dataclass
class ElboOptions:
    """Options of ``elbo``: the weight of the divergence and the posteriors' settings."""

    kl_weight: float = 0.01
    normalization: KLNormalization = KLNormalization.data
    prior_scale: float = 1.0
    temperature: float = 1.0
    estimator: str | None = None  # how training draws the weights; null: the architecture's own way
    absorb: AbsorbOptions = field(default_factory=AbsorbOptions)

    def posterior(self) -> Posterior:
        """The part that the layers are built from."""
        return Posterior(self.prior_scale, self.estimator, self.temperature)


class Elbo:
    """Penalty ``kl_weight * KL_i / n_i`` per task, to be added to that task's RL loss.

    Args:
        options: weight and normalisation.
        num_tasks: number of tasks.
    """

    def __init__(self, options: ElboOptions, num_tasks: int) -> None:
        self.kl_weight = options.kl_weight
        self.normalization = options.normalization
        self.absorb = options.absorb
        self.num_tasks = num_tasks

    def penalty(self, module: nn.Module, transitions_per_task: int) -> Tensor | float:
        """``kl_weight * KL_i / n_i`` of the posteriors in ``module``, ``[T]``; 0 when the weight is 0."""
        if self.kl_weight == 0.0:
            return 0.0
        weight = self.kl_weight / self._divisor(module, transitions_per_task)
        return total_kl(module, self.num_tasks) * weight

    def _divisor(self, module: nn.Module, transitions_per_task: int) -> float:
        if self.normalization is KLNormalization.data:
            return float(max(transitions_per_task, 1))
        if self.normalization is KLNormalization.parameters:
            return float(max(posterior_size(module), 1))
        return 1.0


def posterior_size(module: nn.Module) -> int:
    """Number of Gaussian weights in one task's posterior."""
    size = 0
    for layer in module.modules():
        for name in getattr(layer, "spread_parameters", ()):
            size += layer.get_parameter(name)[0].numel()
    return size
