"""PopArt: value targets brought to zero mean and unit standard deviation per task, with values kept as they were."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from varshare_rl.nn.task_rows import TaskIds, in_order

#: Bounds on the standard deviation that values are measured in.
LEAST_STD, LARGEST_STD = 1e-4, 1e6


class Move(NamedTuple):
    """Statistics have moved: what was ``y`` in old units is ``ratio * y + shift`` in new ones, each ``[T]``."""

    ratio: Tensor
    shift: Tensor


class TargetStatistics(nn.Module):
    """Mean and standard deviation of the value targets of every task, forgetting at a rate.

    ``m <- m + rate (E[y] - m)`` and ``v <- v + rate (E[y^2] - v)``, both divided by ``1 - (1 - rate)^n`` after
    ``n`` batches, so that the first ones are not drawn towards their start at 0 (the correction of Kingma and Ba
    2015); ``mean = m``, ``std = sqrt(v - m^2)``, held between 1e-4 and 1e6 (van Hasselt et al. 2016; per task:
    Hessel et al. 2019). Before there is a batch the mean is 0 and the standard deviation 1. A task's batch with a target that
    is not finite does not count for that task. Statistics are float64.

    Args:
        num_tasks: ``T``.
        rate: weight of a new batch, in (0, 1].
    """

    per_task_buffers = ("first", "second", "weight", "mean", "std")
    first: Tensor
    second: Tensor
    weight: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, num_tasks: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        for name in ("first", "second", "weight", "mean"):
            self.register_buffer(name, torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("std", torch.ones(num_tasks, dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_read_former_name)

    @torch.no_grad()
    def update(self, target: Tensor) -> Move:
        """Take in targets ``[T, B]``. A task's first batch sets its statistics, which moves nothing."""
        target = target.double()
        counts, set_before = torch.isfinite(target).all(1), self.weight > 0
        moments = (target.mean(1), target.square().mean(1), torch.ones_like(self.weight))
        for average, newest in zip((self.first, self.second, self.weight), moments, strict=True):
            average.copy_(torch.where(counts, average.lerp(newest, self.rate), average))
        mean = torch.where(counts, self.first / self.weight, self.mean)
        variance = (self.second / self.weight - mean.square()).clamp_min(0.0)
        std = torch.where(counts, variance.sqrt().clamp(LEAST_STD, LARGEST_STD), self.std)
        ratio = torch.where(set_before, self.std / std, 1.0)
        shift = torch.where(set_before, (self.mean - mean) / std, 0.0)
        self.mean.copy_(mean)
        self.std.copy_(std)
        return Move(ratio, shift)

    def normalize(self, value: Tensor, task_ids: TaskIds) -> Tensor:
        """``(value - mean) / std``, ``[T, B]``."""
        mean, std = (rows(statistic, task_ids, value).to(value.dtype) for statistic in (self.mean, self.std))
        return (value - mean) / std

    def restore(self, normalized: Tensor, task_ids: TaskIds) -> Tensor:
        """``std * normalized + mean``, ``[T, B]``."""
        statistics = (self.mean, self.std)
        mean, std = (rows(values, task_ids, normalized).to(normalized.dtype) for values in statistics)
        return torch.addcmul(mean, std, normalized)


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
        return torch.addcmul(rows(self.offset, task_ids, x), rows(self.scale, task_ids, x), x)

    @torch.no_grad()
    def follow(self, move: Move) -> None:
        """``a <- ratio a`` and ``c <- ratio c + shift``: unnormalised outputs stay what they were."""
        self.scale.copy_(move.ratio * self.scale)
        self.offset.copy_(move.ratio * self.offset + move.shift)


def rows(stacked: Tensor, task_ids: TaskIds, like: Tensor) -> Tensor:
    """Entries of ``stacked [T]`` for the tasks of ``like``, in a shape that broadcasts with it.

    ``like`` is ``[K, B]`` with ids ``[K]``, flat ``[N]`` with ids ``[N]``, or of any shape with one id.
    """
    ids = torch.as_tensor(task_ids)
    everything = ids.dim() == 1 and in_order(ids, len(stacked))
    chosen = stacked if everything else stacked[ids.to(stacked.device)]
    return chosen.unsqueeze(1) if ids.dim() == 1 and like.dim() == 2 else chosen


def _read_former_name(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Take the standard deviation of checkpoints that call it ``spread``."""
    if f"{prefix}spread" in state:
        state[f"{prefix}std"] = state.pop(f"{prefix}spread")
