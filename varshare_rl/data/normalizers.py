"""Running statistics per task, and observations brought to zero mean and unit variance by them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Mean and variance per task and feature over everything seen.

    Batches are merged exactly (Chan, Golub and LeVeque 1979). Statistics are buffers in float64.

    Args:
        num_tasks: ``T``.
        size: number of features, ``F``.
    """

    per_task_buffers = ("mean", "squared_deviations")
    count: Tensor
    mean: Tensor
    squared_deviations: Tensor

    def __init__(self, num_tasks: int, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(num_tasks, size, dtype=torch.float64))
        self.register_buffer("squared_deviations", torch.zeros(num_tasks, size, dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Take in ``x: [T, B, F]``."""
        x = x.double()
        batch_mean = x.mean(1)
        batch_deviations = (x - batch_mean.unsqueeze(1)).square().sum(1)
        added = x.shape[1]
        total = self.count + added
        difference = batch_mean - self.mean
        self.mean += difference * (added / total)
        self.squared_deviations += batch_deviations + difference.square() * (self.count * added / total)
        self.count.copy_(total)

    def std(self, floor: float = 1e-4) -> Tensor:
        """Standard deviation ``[T, F]``, at least ``floor``; 1 before there are two samples."""
        if self.count < 2:
            return torch.ones_like(self.mean)
        return (self.squared_deviations / self.count).sqrt().clamp_min(floor)


class ObservationNormalizer(nn.Module):
    """``clip((obs - mean) / std)`` with running moments per task.

    Args:
        num_tasks: ``T``.
        obs_size: ``F``.
        enabled: when False observations pass unchanged.
        clip: bound on the normalised values.
    """

    def __init__(self, num_tasks: int, obs_size: int, enabled: bool, clip: float = 10.0) -> None:
        super().__init__()
        self.enabled, self.clip = enabled, clip
        self.moments = RunningMoments(num_tasks, obs_size)

    def update(self, obs: Tensor) -> None:
        """Take in observations ``[T, B, F]``."""
        if self.enabled:
            self.moments.update(obs)

    def forward(self, obs: Tensor) -> Tensor:
        """Normalise ``[T, ..., F]``."""
        if not self.enabled:
            return obs
        shape = (obs.shape[0], *[1] * (obs.dim() - 2), obs.shape[-1])
        mean = self.moments.mean.float().view(shape)
        std = self.moments.std().float().view(shape)
        return ((obs - mean) / std).clamp(-self.clip, self.clip)
