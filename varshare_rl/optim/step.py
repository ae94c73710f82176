"""The one place where losses per task become a gradient and a step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from varshare_rl.optim.divergence_guard import DivergenceGuard, DivergenceGuardConfig, contained
from varshare_rl.optim.gradient import GradientConfig
from varshare_rl.optim.jacobian import gradient_gram
from varshare_rl.optim.optimizer import OptimizerConfig, ScheduledAdam, roles
from varshare_rl.optim.reduction import MeanReduction, Reduction, TemperatureReduction, build_reduction
from varshare_rl.types import Tree


class LossStep:
    """Reduce losses per task to a gradient, clip its norm, and step Adam.

    The reduction is the mean over tasks unless another is chosen with :meth:`aggregate_by`. Tasks that the guard
    leaves out count as a loss of 0: the others' gradients stay as they are.

    Args:
        trained: a module, or bare parameters; layers list stacked ones in ``per_task_parameters``.
        learning_rate: of Adam, before the factors of ``optimizer``.
        max_grad_norm: bound on the norm of the whole combined gradient, shared and own parameters together; 0
            switches clipping off.
        epsilon: Adam's epsilon.
        optimizer: rates, decay and schedule.
        divergence_guard: which tasks are left out of a step.
    """

    def __init__(
        self,
        trained: nn.Module | Sequence[nn.Parameter],
        learning_rate: float,
        max_grad_norm: float,
        epsilon: float = 1e-8,
        optimizer: OptimizerConfig | None = None,
        divergence_guard: DivergenceGuardConfig | None = None,
    ) -> None:
        self.trained = trained
        self.roles = roles(trained)
        self.parameters = [role.parameter for role in self.roles]
        self.max_grad_norm = max_grad_norm
        self.gram: Tensor | None = None  # of the tasks' gradients, when it was last asked for
        self._gram_of: list[nn.Parameter] | None = None
        self.scheduled = ScheduledAdam(self.roles, learning_rate, epsilon, optimizer or OptimizerConfig())
        self.divergence_guard = DivergenceGuard(divergence_guard or DivergenceGuardConfig())
        self.reduction: Reduction = MeanReduction()

    @property
    def optimizer(self) -> torch.optim.Adam:
        """Adam itself."""
        return self.scheduled.adam

    def aggregate_by(self, name: str, config: GradientConfig, num_tasks: int) -> None:
        """Choose the reduction; ``softmax_temperature`` is the mean until :meth:`follow_temperature`."""
        assert isinstance(self.trained, nn.Module)
        self.reduction = build_reduction(name, config, num_tasks, self.trained, self.roles)

    def follow_temperature(self, log_temperature: Tensor) -> None:
        """Weigh the tasks by ``softmax(-log_temperature)``."""
        own = [role.parameter for role in self.roles if role.own]
        self.reduction = TemperatureReduction(own, log_temperature)

    def __call__(self, losses: Tensor) -> Tensor:
        """Step on ``losses [T]``; returns the norm of the combined gradient before clipping."""
        if self._gram_of is not None:
            self.gram, self._gram_of = gradient_gram(losses, self._gram_of), None
        self.optimizer.zero_grad(set_to_none=True)
        kept = self.divergence_guard.kept(losses, self.reduction.waits)
        if kept is not None:
            losses = torch.where(kept, losses, 0.0)
        with nullcontext() if kept is None else contained(losses):
            self.reduction(losses, kept)
        bound = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(self.parameters, bound, foreach=True).detach()
        self._step(norm)
        return norm

    def _step(self, norm: Tensor) -> None:
        """Step the optimiser unless the guard forbids it; on a device, the device decides."""
        here = self._decides_here(norm)
        dropped = None if here and bool(torch.isfinite(norm)) else self.divergence_guard.drop(norm)
        if here and dropped is not None and bool(dropped):
            return
        self.optimizer.found_inf = None if here else dropped  # type: ignore[attr-defined]  # fused Adam obeys it
        self.optimizer.step()

    def measure_gram(self, parameters: Sequence[nn.Parameter]) -> None:
        """Have the next call leave :func:`gradient_gram` of its losses by ``parameters`` in :attr:`gram`.

        The step itself stays the same to the bit.
        """
        self.gram = None
        self._gram_of = list(parameters) or None

    def _decides_here(self, tensor: Tensor) -> bool:
        """Whether looking at a number costs no waiting for a device."""
        return tensor.is_cpu

    def advance(self, fraction: float) -> None:
        """Set learning rates for when ``fraction`` of the run is done, and take note of what the guard saw."""
        self.scheduled.advance(fraction)
        self.divergence_guard.look()

    def forget(self) -> None:
        """Start afresh for parameters that do: no moments, no running losses, no memory of the reduction."""
        self.optimizer.state.clear()
        self.divergence_guard.forget()
        self.reduction.forget()

    def state(self) -> Tree:
        """Optimiser, what the reduction remembers, and the guard's counts."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "reduction": self.reduction.state(),
            "guard": self.divergence_guard.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.reduction.load_state(state["reduction"])
        self.divergence_guard.load_state(state["guard"], self.parameters[0].device)
