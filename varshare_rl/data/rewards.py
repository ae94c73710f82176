"""Scales of the tasks' rewards, so that no task drowns another."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from varshare_rl.data.normalizers import RunningMoments
from varshare_rl.types import Tree


class RewardScale(Enum):
    """What a task's rewards are multiplied by."""

    none = "none"  # 1
    return_std = "return_std"  # one over the running standard deviation of the discounted return
    ars = "ars"  # the largest mean reward of all tasks over the task's own


class RewardScaler(nn.Module):
    """Leaves rewards as they are, and is what the others have in common."""

    def update(self, reward: Tensor, done: Tensor) -> None:
        """Take in one vector step: ``reward [T, E]`` and ``done [T, E]`` (terminated or truncated)."""

    def settle(self) -> None:
        """Note that learning has begun, so that a change of scale would cost something."""

    def refresh(self) -> None:
        """Note that networks start anew, so that a change of scale costs nothing now."""

    def forward(self, reward: Tensor) -> Tensor:
        """Scale ``[T, ...]``."""
        return reward

    def restore(self, state: Tree) -> None:
        """Put back what ``state_dict`` gave."""
        self.load_state_dict(state)


class ReturnStdScaler(RewardScaler):
    """Rewards divided by the running standard deviation of the discounted return so far, per task.

    The scaling of Engstrom et al. 2020 (section 3, "reward scaling"), with one scale per task. Rewards are
    scaled before advantages are computed, so values and returns live on one scale.

    Args:
        num_tasks: ``T``.
        discount: of the return whose spread is measured.
        clip: bound on the scaled rewards.
    """

    returns: Tensor

    def __init__(self, num_tasks: int, discount: float, clip: float = 10.0) -> None:
        super().__init__()
        self.discount, self.clip = discount, clip
        self.moments = RunningMoments(num_tasks, 1)
        self.register_buffer("returns", torch.zeros(num_tasks, 0, dtype=torch.float64))

    def update(self, reward: Tensor, done: Tensor) -> None:
        """Take in one vector step, as above."""
        if self.returns.shape != reward.shape:
            self.returns = torch.zeros_like(reward, dtype=torch.float64)
        self.returns = self.returns * self.discount + reward
        self.moments.update(self.returns.unsqueeze(-1))
        self.returns = self.returns * ~done

    def forward(self, reward: Tensor) -> Tensor:
        """Scale ``[T, ...]``."""
        std = self.moments.std().float().view(-1, *[1] * (reward.dim() - 1))
        return (reward / std).clamp(-self.clip, self.clip)

    def restore(self, state: Tree) -> None:
        """Put back what ``state_dict`` gave; the running returns have the shape of the environments."""
        self.returns = state["returns"].to(self.returns.device)
        self.load_state_dict(state)


class AdaptiveRewardScaler(RewardScaler):
    """Rewards of task ``i`` times ``max_j m_j / m_i``, where ``m`` is the mean absolute reward of the task so far.

    Adaptive reward scaling (Cho et al. 2025, equation 6 and algorithm 1). Scales follow the rewards until the first
    :meth:`settle`, and then change at each :meth:`refresh` only, when networks start anew: between, a moving scale
    would move the targets. Rewards are counted from the beginning of the run. A task whose rewards were all 0, or
    one of them not finite, has scale 1 and is nobody's measure.

    Args:
        num_tasks: ``T``.
    """

    per_task_buffers = ("total", "scales")
    total: Tensor
    count: Tensor
    scales: Tensor
    settled: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scales", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool))

    def update(self, reward: Tensor, done: Tensor) -> None:
        """Take in one vector step, as above."""
        self.total += reward.double().abs().sum(1)
        self.count += reward.shape[1]
        self.scales.copy_(torch.where(self.settled, self.scales, self._now()))

    def settle(self) -> None:
        """From here on scales change at :meth:`refresh` only."""
        self.settled.fill_(True)

    def refresh(self) -> None:
        """Take the scales that follow from all rewards so far."""
        self.scales.copy_(self._now())

    def forward(self, reward: Tensor) -> Tensor:
        """Scale ``[T, ...]``."""
        return reward * self.scales.float().view(-1, *[1] * (reward.dim() - 1))

    def _now(self) -> Tensor:
        mean = self.total / self.count.clamp_min(1.0)
        measured = mean.isfinite() & (mean > 0)
        return torch.where(measured, torch.where(measured, mean, 0.0).max() / mean, 1.0)


def reward_scaler(kind: RewardScale, num_tasks: int, discount: float) -> RewardScaler:
    """The scaler of ``kind``."""
    if kind is RewardScale.return_std:
        return ReturnStdScaler(num_tasks, discount)
    return AdaptiveRewardScaler(num_tasks) if kind is RewardScale.ars else RewardScaler()
