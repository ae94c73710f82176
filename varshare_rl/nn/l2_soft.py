"""L2-soft: VarShare without noise, its residuals held near zero by their squared norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from varshare_rl.nn.initial import check_positive
from varshare_rl.nn.options import ArchitectureOptions, Posterior
from varshare_rl.nn.residual import ResidualLayer


class L2SoftLayer(ResidualLayer):
    """Layer with residuals whose tasks pay ``1/2 ||phi_i||^2 / prior_scale^2``, in nats.

    That is the mean's part of the divergence of a Gaussian posterior from the prior ``N(0, prior_scale^2)``:
    ``KL(N(mu, sigma^2) || p) = mu^2 / (2 prior_scale^2) + (what depends on sigma alone)``, summed over entries.
    Of a low-rank residual ``phi_i`` is both factors, as in VarShare-LoRA's divergence.

    Attributes:
        as of :class:`ResidualLayer`, and prior_scale.
    """

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


@dataclass
class L2Soft(ArchitectureOptions):
    """``network=l2_soft``: every linear layer an :class:`L2SoftLayer`, the ablation of VarShare's noise.

    Residuals and start are those of ``varshare_lora`` (``rank=8``) or of ``varshare`` (``rank=null``), the
    penalty is the mean's part of their divergence, and ``elbo.kl_weight``, ``elbo.normalization`` and
    ``elbo.prior_scale`` act on it as on the whole, so one sweep serves all of them. What is missing is the noise
    and the price of precision. Active are ``theta`` and the task's own residual.
    """

    name: str = "l2_soft"
    rank: int | None = 8  # null: full rank
    alpha: float | None = None

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        """A network of penalised residual layers for ``num_tasks`` tasks."""

        def layer(inputs: int, outputs: int) -> nn.Module:
            return L2SoftLayer(inputs, outputs, num_tasks, self.rank, self.alpha, posterior.prior_scale)

        return self.stack(in_features, out_features, layer)
