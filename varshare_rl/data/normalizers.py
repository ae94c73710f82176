"""Running statistics per task, and observations and rewards brought to a common scale by them."""

from __future__ import annotations

from enum import Enum
from typing import cast

import torch
from torch import Tensor, nn

#: The smallest standard deviation that anything is divided by, unless told otherwise.
LEAST_STD = 1e-4


class RunningMoments(nn.Module):
    """Mean and variance per task and feature over everything seen that is finite.

    Batches are merged exactly (Chan, Golub and LeVeque 1979). Statistics are buffers in float64.

    Args:
        num_tasks: ``T``.
        size: number of features, ``F``.
    """

    per_task_buffers = ("count", "mean", "squared_deviations")
    count: Tensor
    mean: Tensor
    squared_deviations: Tensor

    def __init__(self, num_tasks: int, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(num_tasks, 1, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(num_tasks, size, dtype=torch.float64))
        self.register_buffer("squared_deviations", torch.zeros(num_tasks, size, dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_count_per_task)  # type: ignore[no-untyped-call]

    def update(self, x: Tensor) -> None:
        """Take in ``x: [T, B, F]``, but for the rows that are not finite."""
        x = x.double()
        kept = x.isfinite().all(-1, keepdim=True)
        x = torch.where(kept, x, 0.0)
        added = kept.sum(1).double()  # [T, 1]
        batch_mean = x.sum(1) / added.clamp_min(1.0)
        batch_deviations = torch.where(kept, x - batch_mean.unsqueeze(1), 0.0).square().sum(1)
        total = self.count + added
        share = added / total.clamp_min(1.0)
        difference = batch_mean - self.mean
        self.mean += difference * share
        self.squared_deviations += batch_deviations + difference.square() * (self.count * share)
        self.count.copy_(total)

    def std(self, floor: float = LEAST_STD) -> Tensor:
        """Standard deviation ``[T, F]``, at least ``floor``; 1 for a task with less than two samples."""
        std = (self.squared_deviations / self.count.clamp_min(1.0)).sqrt().clamp_min(floor)
        return torch.where(self.count < 2, 1.0, std)


def _count_per_task(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Take the count of checkpoints that have one for all tasks."""
    name = f"{prefix}count"
    if name in state and state[name].dim() == 0:
        state[name] = state[name].expand_as(cast(Tensor, module.count)).clone()


class ObservationNormalizer(nn.Module):
    """``clip((obs - mean) / std)`` with running moments per task; what is not a number becomes 0.

    Args:
        num_tasks: ``T``.
        obs_size: ``F``.
        enabled: when False finite observations pass unchanged, and others become 0.
        least_std: the smallest standard deviation that they are divided by, in their own units.
        clip: bound on the normalised values.
    """

    def __init__(
        self, num_tasks: int, obs_size: int, enabled: bool, least_std: float = LEAST_STD, clip: float = 10.0
    ) -> None:
        super().__init__()
        self.enabled, self.least_std, self.clip = enabled, least_std, clip
        self.fixed = False
        self.moments = RunningMoments(num_tasks, obs_size)

    def fix(self, mean: Tensor, std: Tensor) -> None:
        """Take ``mean [F]`` and ``std [F]`` for every task from now on, whatever is observed."""
        moments, self.fixed = self.moments, True
        moments.count.fill_(2.0)
        moments.mean.copy_(mean.expand_as(moments.mean))
        moments.squared_deviations.copy_((2.0 * std.double().square()).expand_as(moments.mean))

    def update(self, obs: Tensor) -> None:
        """Take in observations ``[T, B, F]``."""
        if self.enabled and not self.fixed:
            self.moments.update(obs)

    def std(self) -> Tensor:
        """Standard deviations that observations are divided by, ``[T, F]``."""
        return self.moments.std(self.least_std)

    def forward(self, obs: Tensor) -> Tensor:
        """Normalise ``[T, ..., F]``."""
        if not self.enabled:
            return torch.nan_to_num(obs, 0.0, 0.0, 0.0)
        shape = (obs.shape[0], *[1] * (obs.dim() - 2), obs.shape[-1])
        mean = self.moments.mean.float().view(shape)
        std = self.std().float().view(shape)
        return torch.nan_to_num((obs - mean) / std, 0.0).clamp(-self.clip, self.clip)


class ObservationStatistics(Enum):
    """Origins of the statistics that observations are normalised by."""

    running = "running"  # of each task's observations so far
    suite = "suite"  # fixed scales that the suite knows


class RewardScale(Enum):
    """Factors on a task's rewards."""

    none = "none"  # 1
    return_std = "return_std"  # one over the running standard deviation of the discounted return
    ars = "ars"  # the largest mean reward of all tasks over the task's own


class RewardScaler(nn.Module):
    """Rewards as they are, but 0 for what is not finite; the base class of the other scalers."""

    def update(self, reward: Tensor, done: Tensor, learning: bool) -> None:
        """Take in one vector step: ``reward [T, E]`` and ``done [T, E]`` (terminated or truncated).

        ``learning``: networks have been updated, so that a change of scale would cost something.
        """

    def end(self, done: Tensor) -> None:
        """Take note of episodes that have ended, ``[T, E]``, where :meth:`update` was not told."""

    def refresh(self) -> None:
        """Note that networks start anew, so that a change of scale costs nothing now."""

    def factors(self) -> Tensor | None:
        """What a task's rewards are multiplied by now, ``[T]``; None: by 1."""
        return None

    def forward(self, reward: Tensor) -> Tensor:
        """Scale ``[T, ...]``."""
        return _finite(reward)


def _finite(reward: Tensor) -> Tensor:
    return torch.nan_to_num(reward, 0.0, 0.0, 0.0)


class ReturnStdScaler(RewardScaler):
    """Rewards divided by the running standard deviation of the discounted return so far, per task.

    The scaling of Engstrom et al. 2020 (section 3, "reward scaling"), with one scale per task. Rewards are
    scaled before advantages are computed, so values and returns live on one scale.

    Args:
        num_tasks: ``T``.
        discount: of the return whose standard deviation is measured.
        clip: bound on the scaled rewards.
    """

    returns: Tensor

    def __init__(self, num_tasks: int, discount: float, clip: float = 10.0) -> None:
        super().__init__()
        self.discount, self.clip = discount, clip
        self.moments = RunningMoments(num_tasks, 1)
        self.register_buffer("returns", torch.zeros(num_tasks, 0, dtype=torch.float64))
        # The running returns have the shape of the environments.
        self.register_load_state_dict_pre_hook(_take_shape)  # type: ignore[no-untyped-call]

    def update(self, reward: Tensor, done: Tensor, learning: bool) -> None:
        if self.returns.shape != reward.shape:
            self.returns = torch.zeros_like(reward, dtype=torch.float64)
        self.returns = self.returns * self.discount + _finite(reward)
        self.moments.update(self.returns.unsqueeze(-1))
        self.end(done)

    def end(self, done: Tensor) -> None:
        if self.returns.numel():  # none before the first reward
            self.returns = self.returns * ~done

    def factors(self) -> Tensor:
        return 1.0 / self.moments.std().squeeze(1)

    def forward(self, reward: Tensor) -> Tensor:
        """Scale ``[T, ...]``."""
        std = self.moments.std().float().view(-1, *[1] * (reward.dim() - 1))
        return (_finite(reward) / std).clamp(-self.clip, self.clip)


def _take_shape(scaler: ReturnStdScaler, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    scaler.returns = state[f"{prefix}returns"].to(scaler.returns.device)


class AdaptiveRewardScaler(RewardScaler):
    """Rewards of task ``i`` times ``max_j m_j / m_i``, where ``m`` is the mean absolute reward of the task so far.

    Adaptive reward scaling (Cho et al. 2025, equation 6 and algorithm 1). Scales follow the rewards until
    networks learn, and then change at each :meth:`refresh` only, when networks start anew: between, a moving scale
    would move the targets. Rewards are counted from the beginning of the run, those that are not finite left out. A
    task whose rewards were all 0 has scale 1 and is nobody's measure.

    Args:
        num_tasks: ``T``.
    """

    per_task_buffers = ("total", "count", "scales")
    total: Tensor
    count: Tensor
    scales: Tensor
    settled: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("scales", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool))
        self.register_load_state_dict_pre_hook(_count_per_task)  # type: ignore[no-untyped-call]

    def update(self, reward: Tensor, done: Tensor, learning: bool) -> None:
        if learning:
            self.settled.fill_(True)
        self.total += _finite(reward).double().abs().sum(1)
        self.count += reward.isfinite().sum(1)
        self.scales.copy_(torch.where(self.settled, self.scales, self._now()))

    def refresh(self) -> None:
        """Take the scales that follow from all rewards so far."""
        self.scales.copy_(self._now())

    def factors(self) -> Tensor:
        return self.scales

    def forward(self, reward: Tensor) -> Tensor:
        """Scale ``[T, ...]``."""
        return _finite(reward) * self.scales.float().view(-1, *[1] * (reward.dim() - 1))

    def _now(self) -> Tensor:
        mean = self.total / self.count.clamp_min(1.0)
        measured = mean.isfinite() & (mean > 0)
        return torch.where(measured, torch.where(measured, mean, 0.0).max() / mean, 1.0)


def reward_scaler(kind: RewardScale, num_tasks: int, discount: float) -> RewardScaler:
    """Return the scaler of ``kind``."""
    if kind is RewardScale.return_std:
        return ReturnStdScaler(num_tasks, discount)
    return AdaptiveRewardScaler(num_tasks) if kind is RewardScale.ars else RewardScaler()
