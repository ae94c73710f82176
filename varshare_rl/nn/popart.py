"""PopArt: value targets brought to zero mean and unit spread per task, with values kept as they were."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from varshare_rl.nn.task_rows import TaskIds, all_tasks

#: Bounds on the spread that values are measured in.
LEAST_SPREAD, LARGEST_SPREAD = 1e-4, 1e6


class Move(NamedTuple):
    """Statistics have moved: what was ``y`` in old units is ``ratio * y + shift`` in new ones, each ``[T]``."""

    ratio: Tensor
    shift: Tensor


class TargetStatistics(nn.Module):
    """Mean and spread of the value targets of every task, forgetting at a rate.

    ``m <- m + rate (E[y] - m)`` and ``v <- v + rate (E[y^2] - v)``, both divided by ``1 - (1 - rate)^n`` after
    ``n`` batches, so that the first ones are not drawn towards their start at 0 (the correction of Kingma and Ba
    2015); ``mean = m``, ``spread = sqrt(v - m^2)``, held between 1e-4 and 1e6 (van Hasselt et al. 2016; per task:
    Hessel et al. 2019). Before there is a batch the mean is 0 and the spread 1. Statistics are float64.

    Args:
        num_tasks: ``T``.
        rate: weight of a new batch, in (0, 1].
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(self, num_tasks: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        for name in ("first", "second", "mean"):
            self.register_buffer(name, torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("spread", torch.ones(num_tasks, dtype=torch.float64))

    @torch.no_grad()
    def update(self, target: Tensor) -> Move:
        """Take in targets ``[T, B]``. The first batch sets the statistics, which moves nothing."""
        target = target.double()
        unset = self.weight == 0
        self.first.lerp_(target.mean(1), self.rate)
        self.second.lerp_(target.square().mean(1), self.rate)
        self.weight.lerp_(torch.ones_like(self.weight), self.rate)
        mean = self.first / self.weight
        variance = (self.second / self.weight - mean.square()).clamp_min(0.0)
        spread = variance.sqrt().clamp(LEAST_SPREAD, LARGEST_SPREAD)
        ratio = torch.where(unset, 1.0, self.spread / spread)
        shift = torch.where(unset, 0.0, (self.mean - mean) / spread)
        self.mean.copy_(mean)
        self.spread.copy_(spread)
        return Move(ratio, shift)

    def normalize(self, value: Tensor, task_ids: TaskIds) -> Tensor:
        """``(value - mean) / spread``, ``[T, B]``."""
        mean, spread = (rows(statistic, task_ids).to(value.dtype) for statistic in (self.mean, self.spread))
        return (value - mean) / spread

    def restore(self, normalized: Tensor, task_ids: TaskIds) -> Tensor:
        """``spread * normalized + mean``, ``[T, B]``."""
        mean, spread = (rows(statistic, task_ids).to(normalized.dtype) for statistic in (self.mean, self.spread))
        return torch.addcmul(mean, spread, normalized)


class TaskAffine(nn.Module):
    """``a_i x + c_i`` with a scale and an offset of its own for every task; the identity at the start.

    Heads of task networks have weights that tasks share, so no head can take up one task's move of statistics.
    This map can.
    """

    per_task_parameters = ("scale", "offset")

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_tasks))
        self.offset = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, x: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B]`` in and out."""
        return torch.addcmul(rows(self.offset, task_ids), rows(self.scale, task_ids), x)

    @torch.no_grad()
    def follow(self, move: Move) -> None:
        """``a <- ratio a`` and ``c <- ratio c + shift``: unnormalised outputs stay what they were."""
        self.scale.copy_(move.ratio * self.scale)
        self.offset.copy_(move.ratio * self.offset + move.shift)


def rows(stacked: Tensor, task_ids: TaskIds) -> Tensor:
    """Entries of ``stacked [T]`` as ``[K, 1]`` for the tasks of a task-major batch, or ``[]`` for one task."""
    ids = torch.as_tensor(task_ids)
    if ids.dim() == 1 and torch.equal(ids, all_tasks(len(stacked))):
        return stacked.unsqueeze(1)
    chosen = stacked[ids.to(stacked.device)]
    return chosen if ids.dim() == 0 else chosen.unsqueeze(1)
