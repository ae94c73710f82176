"""Running statistics per task: observations to zero mean and unit variance, rewards to unit return."""

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


class RewardNormalizer(nn.Module):
    """Rewards divided by the running standard deviation of the discounted return so far, per task.

    The scaling of Engstrom et al. 2020 (section 3, "reward scaling"), with one scale per task. Rewards are
    scaled before advantages are computed, so values and returns live on one scale.

    Args:
        num_tasks: ``T``.
        discount: of the return whose spread is measured.
        enabled: when False rewards pass unchanged.
        clip: bound on the scaled rewards.
    """

    returns: Tensor

    def __init__(self, num_tasks: int, discount: float, enabled: bool, clip: float = 10.0) -> None:
        super().__init__()
        self.discount, self.enabled, self.clip = discount, enabled, clip
        self.moments = RunningMoments(num_tasks, 1)
        self.register_buffer("returns", torch.zeros(num_tasks, 0, dtype=torch.float64))

    def update(self, reward: Tensor, done: Tensor) -> None:
        """Take in one vector step: ``reward [T, E]`` and ``done [T, E]`` (terminated or truncated)."""
        if not self.enabled:
            return
        if self.returns.shape != reward.shape:
            self.returns = torch.zeros_like(reward, dtype=torch.float64)
        self.returns = self.returns * self.discount + reward
        self.moments.update(self.returns.unsqueeze(-1))
        self.returns = self.returns * ~done

    def forward(self, reward: Tensor) -> Tensor:
        """Scale ``[T, ...]``."""
        if not self.enabled:
            return reward
        std = self.moments.std().float().view(-1, *[1] * (reward.dim() - 1))
        return (reward / std).clamp(-self.clip, self.clip)
