"""From losses per task to the gradient of every parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from varshare_rl.optim.aggregators import GradientAggregator
from varshare_rl.optim.gradient import GradientConfig
from varshare_rl.optim.jacobian import TaskGradients
from varshare_rl.optim.optimizer import Role
from varshare_rl.types import Tree

#: A softmax weight below this is taken for it when a task's own gradient is scaled back.
_LEAST = 1e-12


class Reduction(Protocol):
    """Fills ``grad`` of the parameters that are trained, from losses ``[T]``.

    What a task owns gets the gradient of the mean, ``1 / T`` times that of its own loss, from every reduction.
    """

    waits: bool  # it reads numbers from the device anyway

    def __call__(self, losses: Tensor, kept: Tensor | None) -> None:
        """``kept [T]`` bool: the tasks that count. The others' losses are 0, without a gradient."""

    def memory_bytes(self, num_tasks: int) -> int:
        """Predicted bytes of the gradients per task that it keeps; a look for mixing takes as much for a moment."""

    def forget(self) -> None:
        """Remember nothing, as at the start."""

    def state(self) -> Tree:
        """What it remembers."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` gave."""


class MeanReduction:
    """The gradient of the mean over tasks."""

    waits = False

    def __call__(self, losses: Tensor, kept: Tensor | None) -> None:
        torch.autograd.backward(losses.mean())

    def memory_bytes(self, num_tasks: int) -> int:
        return 0

    def forget(self) -> None:
        pass

    def state(self) -> Tree:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


class TemperatureReduction:
    """The tasks' losses weighed by ``softmax_i(-log alpha_i)`` in what they share (Yang et al. 2020, section 4.3).

    ``alpha_i`` is the entropy coefficient of SAC: a task whose policy is still at random, with a large one,
    counts for less.

    Args:
        own: the parameters whose dim 0 is the task.
        log_temperature: ``log alpha [T]``, the one that learns.
    """

    waits = False

    def __init__(self, own: Sequence[nn.Parameter], log_temperature: Tensor) -> None:
        self.own, self.log_temperature = list(own), log_temperature

    def __call__(self, losses: Tensor, kept: Tensor | None) -> None:
        weights = torch.softmax(-self.log_temperature.detach(), 0).clamp_min(_LEAST)
        torch.autograd.backward(torch.dot(weights, losses))
        back = 1.0 / (weights * len(losses))
        for parameter in self.own:
            if parameter.grad is not None:
                parameter.grad.mul_(back.view(-1, *[1] * (parameter.dim() - 1)))

    def memory_bytes(self, num_tasks: int) -> int:
        return 0

    def forget(self) -> None:
        pass

    def state(self) -> Tree:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


class JacobianReduction:
    """What the tasks share follows a combination of their gradients."""

    waits = True

    def __init__(self, gradients: TaskGradients, aggregator: GradientAggregator) -> None:
        self.gradients, self.aggregator = gradients, aggregator

    def __call__(self, losses: Tensor, kept: Tensor | None) -> None:
        if len(losses) == 1:
            torch.autograd.backward(losses.mean())
            return
        rows = self.gradients(losses)
        reached = self.gradients.reached
        combined = self.aggregator(rows, losses.detach(), kept)
        for index, gradient in enumerate(self.gradients.views(combined)):
            if index in reached:
                self.gradients.shared[index].grad = gradient

    def memory_bytes(self, num_tasks: int) -> int:
        return 0 if num_tasks == 1 else num_tasks * sum(parameter.nbytes for parameter in self.gradients.shared)

    def forget(self) -> None:
        self.aggregator.forget()

    def state(self) -> Tree:
        return {"gradients": self.gradients.state(), "combiner": self.aggregator.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.gradients.load_state(state["gradients"])
        self.aggregator.load_state(state["combiner"])


def build_reduction(
    name: str, config: GradientConfig, num_tasks: int, trained: nn.Module, roles: Sequence[Role]
) -> Reduction:
    """The reduction by an aggregator; networks that share nothing need no more than the mean.

    ``softmax_temperature`` is made by the algorithm that has temperatures, as a :class:`TemperatureReduction`.

    Raises:
        UserError: there is no such aggregator, or it needs a package that is not installed.
    """
    aggregator = config.build(name, num_tasks)
    shared = [role.parameter for role in roles if not role.own]
    if aggregator is None or not shared:
        return MeanReduction()
    return JacobianReduction(TaskGradients(trained, shared), aggregator)
