"""GradNorm (Chen et al. 2018): weights of the tasks that are learned, so that their gradients have like norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varshare_rl.fields import bounded
from varshare_rl.optim.gradient import AggregatorConfig
from varshare_rl.optim.jacobian import GradientAggregator
from varshare_rl.registry import register
from varshare_rl.types import Tree

_LEAST = 1e-3


@register("gradient", "gradnorm")
@dataclass
class GradNormConfig(AggregatorConfig):
    """``gradient=gradnorm``: learned weights that make the gradients' norms alike (Chen et al. 2018)."""

    asymmetry: float = bounded(0.0, least=0)
    "Pull on tasks that train slowly, the paper's alpha."
    learning_rate: float = bounded(0.025, least=0)
    "Learning rate of the weights, by Adam."

    def build(self, num_tasks: int) -> GradNorm:
        """Make the aggregator."""
        return GradNorm(self, num_tasks)


class GradNorm(GradientAggregator):
    """Follows ``sum_i w_i g_i / T`` and lets the weights ``w`` descend on

        sum_i | w_i |g_i| - n r_i^a |
        n = mean_j w_j |g_j|,  r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0))

    (equations 1 and 2; ``n r_i^a`` is held constant), then brings them back to a sum of ``T``. ``g_i`` is the
    gradient of task ``i``'s loss ``L_i`` in all shared parameters (the paper takes one layer to save time), and
    ``a`` is ``asymmetry``. A loss of reinforcement learning need be neither positive nor falling: where ``L_i`` or
    ``L_i(0)`` is not positive, ``r_i = 1``. A task that is left out keeps its weight. What there is per task is on
    the CPU, wherever the rows are.
    """

    state_fields = ("weights", "optimizer?", "first?")

    def __init__(self, config: GradNormConfig, num_tasks: int) -> None:
        self.config = config
        self.weights = nn.Parameter(torch.ones(num_tasks))
        self.optimizer = torch.optim.Adam([self.weights], lr=config.learning_rate)
        self.first: Tensor | None = None  # [T] losses of the first step

    def __call__(self, rows: Tensor, losses: Tensor, kept: Tensor | None) -> Tensor:
        """``rows [T, P]`` to the weighted sum ``[P]``; then one step of the weights."""
        losses = losses.detach().cpu()
        if self.first is None:
            self.first = losses.clone()
        gradient = self.weights.detach().to(rows) @ rows
        norms = rows.norm(dim=1).cpu()
        weighted = self.weights.detach() * norms
        counts = torch.ones_like(norms, dtype=torch.bool) if kept is None else kept.cpu()
        counts = counts & torch.isfinite(norms)
        average = torch.where(counts, weighted, 0.0).sum() / counts.sum().clamp_min(1)
        lag = weighted - average * self._rates(losses, counts).pow(self.config.asymmetry)
        self.weights.grad = torch.where(counts, torch.sign(lag) * norms, 0.0).to(self.weights.dtype)
        before = self.weights.detach().clone()
        self.optimizer.step()
        with torch.no_grad():
            self.weights.copy_(torch.where(counts, self.weights.clamp_min(_LEAST), before))
            self.weights.mul_(len(losses) / self.weights.sum())
        return gradient

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave; the learning rate is that of the options."""
        super().load_state(state)
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate

    def _rates(self, losses: Tensor, counts: Tensor) -> Tensor:
        """``r``: how far each task's loss has come, relative to the others; 1 where that says nothing."""
        assert self.first is not None
        fits = counts & (losses > 0) & (self.first > 0)
        share = torch.where(fits, losses / self.first, 0.0)
        mean = share.sum() / fits.sum().clamp_min(1)
        return torch.where(fits, share / mean, 1.0)

    def forget(self) -> None:
        """Equal weights again; the next losses are the first."""
        self.weights.data.fill_(1.0)
        self.optimizer.state.clear()
        self.first = None
