"""LoRA: a shared weight plus, per task, a low-rank residual without noise and without a penalty."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from varshare_rl.nn.options import ArchitectureOptions, Posterior
from varshare_rl.nn.residual import ResidualLayer


@dataclass
class LoRA(ArchitectureOptions):
    """``network=lora``: every linear layer ``W_i = theta + (alpha / rank) B_i A_i`` (Hu et al. 2021).

    It is VarShare-LoRA without its posterior: the same residuals from the same start, neither sampled nor paid
    for. Deviation from the paper: ``theta`` is not a frozen, pretrained weight but is trained together with the
    residuals, and every task has its own. Active are ``theta`` and the task's own factors.
    """

    name: str = "lora"
    rank: int = 8
    alpha: float | None = None

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        """A network of low-rank residual layers for ``num_tasks`` tasks."""

        def layer(inputs: int, outputs: int) -> nn.Module:
            return ResidualLayer(inputs, outputs, num_tasks, self.rank, self.alpha)

        return self.stack(in_features, out_features, layer)
