"""Policies: tanh-squashed Gaussian for Box actions, categorical for Discrete ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from varshare_rl.nn.task_rows import TaskIds
from varshare_rl.ops.rl import (
    categorical_entropy,
    categorical_log_prob,
    masked_logits,
    tanh_normal_log_prob,
)


class Sample(NamedTuple):
    """A drawn action. ``raw`` is what ``log_prob`` is evaluated at: the action before squashing."""

    action: Tensor  # [T, B, A] in [-1, 1], or [T, B] int64
    raw: Tensor  # the same before tanh, or the same integers
    log_prob: Tensor  # [T, B]


class PolicyDistribution(Protocol):
    """What an actor returns for a batch of observations."""

    def sample(self) -> Sample:
        """Draw an action, differentiably where the family allows."""

    def log_prob(self, raw: Tensor) -> Tensor:
        """Log-probability of the action whose ``raw`` form is given, ``[T, B]``."""

    def entropy(self) -> Tensor:
        """Entropy in nats, ``[T, B]``; a one-sample estimate with gradient for the squashed Gaussian."""

    def mode(self) -> Tensor:
        """The deterministic action."""


@dataclass(frozen=True)
class TanhNormal:
    """``tanh(raw)`` with ``raw ~ N(mean, exp(log_std)^2)``; dimensions outside ``mask`` are always 0."""

    mean: Tensor  # [T, B, A]
    log_std: Tensor  # [T, B, A]
    mask: Tensor  # [T, 1, A] float

    def sample(self) -> Sample:
        noise = torch.randn_like(self.mean)
        raw = torch.addcmul(self.mean, self.log_std.exp(), noise)
        return Sample(torch.tanh(raw) * self.mask, raw, self.log_prob(raw))

    def log_prob(self, raw: Tensor) -> Tensor:
        return tanh_normal_log_prob(raw, self.mean, self.log_std, self.mask)

    def entropy(self) -> Tensor:
        return -self.sample().log_prob

    def mode(self) -> Tensor:
        return torch.tanh(self.mean) * self.mask


@dataclass(frozen=True)
class Categorical:
    """A choice with normalised log-probabilities; choices outside the task's mask are never drawn."""

    log_probs: Tensor  # [T, B, A]

    def sample(self) -> Sample:
        uniform = torch.rand_like(self.log_probs).clamp_min_(1e-20)
        action = (self.log_probs - (-uniform.log()).log()).argmax(-1)  # the Gumbel-max trick
        return Sample(action, action, self.log_prob(action))

    def log_prob(self, raw: Tensor) -> Tensor:
        return categorical_log_prob(self.log_probs, raw)

    def entropy(self) -> Tensor:
        return categorical_entropy(self.log_probs)

    def mode(self) -> Tensor:
        return self.log_probs.argmax(-1)


class TanhGaussianActor(nn.Module):
    """Policy for Box actions in ``[-1, 1]``: a task network gives mean and log standard deviation.

    Args:
        network: task network with ``2 A`` outputs.
        action_mask: ``[T, A]`` bool, False where a task has no such action dimension.
        log_std_range: bounds that the log standard deviation is clamped to.
        initial_log_std: added to the network's log standard deviation output.
    """

    per_task_buffers = ("action_mask",)
    action_mask: Tensor

    def __init__(
        self,
        network: nn.Module,
        action_mask: Tensor,
        log_std_range: tuple[float, float] = (-20.0, 2.0),
        initial_log_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("action_mask", action_mask.float().unsqueeze(1), persistent=False)
        self.log_std_range = log_std_range
        self.initial_log_std = initial_log_std

    def with_network(self, network: nn.Module, action_mask: Tensor) -> TanhGaussianActor:
        """The same kind of policy for another network, of the tasks in ``action_mask [T, A]``."""
        return TanhGaussianActor(network, action_mask, self.log_std_range, self.initial_log_std)

    def forward(self, obs: Tensor, task_ids: TaskIds) -> TanhNormal:
        """``obs [T, B, F]`` for all tasks in order to their action distributions."""
        mean, log_std = self.network(obs, task_ids).chunk(2, dim=-1)
        return TanhNormal(mean, (log_std + self.initial_log_std).clamp(*self.log_std_range), self.action_mask)


class CategoricalActor(nn.Module):
    """Policy for Discrete actions: a task network gives the logits.

    Args:
        network: task network with ``A`` outputs.
        action_mask: ``[T, A]`` bool, False where a task has no such choice.
    """

    per_task_buffers = ("action_mask",)
    action_mask: Tensor

    def __init__(self, network: nn.Module, action_mask: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("action_mask", action_mask.unsqueeze(1), persistent=False)

    def with_network(self, network: nn.Module, action_mask: Tensor) -> CategoricalActor:
        """The same kind of policy for another network, of the tasks in ``action_mask [T, A]``."""
        return CategoricalActor(network, action_mask)

    def forward(self, obs: Tensor, task_ids: TaskIds) -> Categorical:
        """``obs [T, B, F]`` for all tasks in order to their action distributions."""
        return Categorical(masked_logits(self.network(obs, task_ids), self.action_mask))


#: A policy of either kind.
Actor = TanhGaussianActor | CategoricalActor
