"""Policies: Gaussian for Box actions, categorical for Discrete ones."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from varshare_rl.nn.task_rows import TaskIds, task_rows
from varshare_rl.ops.gaussian import normal_entropy, normal_log_prob
from varshare_rl.ops.rl import (
    categorical_entropy,
    categorical_log_prob,
    clamp_inward,
    masked_logits,
    tanh_normal_log_prob,
)
from varshare_rl.ranks import for_rows


class Sample(NamedTuple):
    """A drawn action. ``raw`` is what ``log_prob`` is evaluated at: the action before it is squashed or clipped."""

    action: Tensor  # [T, B, A] in [-1, 1], or [T, B] int64
    raw: Tensor  # the same before tanh or clipping, or the same integers
    log_prob: Tensor  # [T, B]


class PolicyDistribution(Protocol):
    """Distribution over actions that an actor returns for a batch of observations."""

    def sample(self, noise: Tensor | None = None) -> Sample:
        """Draw an action, differentiably where the family allows; a Gaussian by the standard normal ``noise``.

        ``noise``: ``[T, B, A]``; None: drawn here.
        """

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

    def sample(self, noise: Tensor | None = None) -> Sample:
        noise = for_rows(torch.randn_like, self.mean) if noise is None else noise
        raw = torch.addcmul(self.mean, self.log_std.exp(), noise)
        return Sample(torch.tanh(raw) * self.mask, raw, self.log_prob(raw))

    def log_prob(self, raw: Tensor) -> Tensor:
        return tanh_normal_log_prob(raw, self.mean, self.log_std, self.mask)

    def entropy(self) -> Tensor:
        return -self.sample().log_prob

    def mode(self) -> Tensor:
        return torch.tanh(self.mean) * self.mask


@dataclass(frozen=True)
class ClippedNormal:
    """``raw ~ N(mean, exp(log_std)^2)``, which the environment sees clipped to ``[-1, 1]``; else as ``TanhNormal``.

    Log-probability and entropy are those of ``raw``, as is usual with PPO (Schulman et al. 2017): clipping is left
    to the environment.
    """

    mean: Tensor  # [T, B, A]
    log_std: Tensor  # [T, B, A]
    mask: Tensor  # [T, 1, A] float

    def sample(self, noise: Tensor | None = None) -> Sample:
        noise = for_rows(torch.randn_like, self.mean) if noise is None else noise
        raw = torch.addcmul(self.mean, self.log_std.exp(), noise)
        return Sample(raw.clamp(-1.0, 1.0) * self.mask, raw, self.log_prob(raw))

    def log_prob(self, raw: Tensor) -> Tensor:
        return (normal_log_prob(raw, self.mean, self.log_std) * self.mask).sum(-1)

    def entropy(self) -> Tensor:
        return (normal_entropy(self.log_std) * self.mask).sum(-1)

    def mode(self) -> Tensor:
        return self.mean.clamp(-1.0, 1.0) * self.mask


@dataclass(frozen=True)
class Categorical:
    """A choice with normalised log-probabilities; choices outside the task's mask are never drawn."""

    log_probs: Tensor  # [T, B, A]

    def sample(self, noise: Tensor | None = None) -> Sample:
        uniform = for_rows(torch.rand_like, self.log_probs).clamp_min_(1e-20)
        action = (self.log_probs - (-uniform.log()).log()).argmax(-1)  # the Gumbel-max trick
        return Sample(action, action, self.log_prob(action))

    def log_prob(self, raw: Tensor) -> Tensor:
        return categorical_log_prob(self.log_probs, raw)

    def entropy(self) -> Tensor:
        return categorical_entropy(self.log_probs)

    def mode(self) -> Tensor:
        return self.log_probs.argmax(-1)


class GaussianFamily(Enum):
    """Ways for a Gaussian's draws to become actions in ``[-1, 1]``."""

    tanh_gaussian = "tanh_gaussian"  # squashed by tanh
    clipped_gaussian = "clipped_gaussian"  # clipped by the environment

    def bound(self, raw: Tensor) -> Tensor:
        """Return actions in ``[-1, 1]``, element by element."""
        return torch.tanh(raw) if self is GaussianFamily.tanh_gaussian else raw.clamp(-1.0, 1.0)


class LogStd(Enum):
    """Origins of the log standard deviation of a Gaussian policy."""

    network = "network"  # an output for each action dimension, beside the mean
    parameter = "parameter"  # a number of each task and action dimension, whatever the observation


@dataclass(frozen=True)
class GaussianConfig:
    """Form of a Gaussian policy: see the options of the same names of PPO."""

    policy: GaussianFamily = GaussianFamily.tanh_gaussian
    log_std: LogStd = LogStd.network
    initial: float = 0.0
    least: float = -20.0
    most: float = 2.0


class GaussianActor(nn.Module):
    """Policy for Box actions in ``[-1, 1]``: a task network gives the mean, and the log standard deviation or not.

    Args:
        network: task network with :meth:`outputs` of ``A`` dimensions.
        action_mask: ``[T, A]`` bool, False where a task has no such action dimension.
        config: see :class:`GaussianConfig`.

    Attributes:
        log_stds: ``[T, A]`` where the log standard deviation is a parameter, else None.
    """

    per_task_parameters: tuple[str, ...] = ()
    per_task_buffers: ClassVar[tuple[str, ...]] = ("action_mask",)
    action_mask: Tensor

    def __init__(self, network: nn.Module, action_mask: Tensor, config: GaussianConfig | None = None) -> None:
        super().__init__()
        self.network, self.config = network, config or GaussianConfig()
        self.register_buffer("action_mask", action_mask.float().unsqueeze(1), persistent=False)
        self.log_stds: nn.Parameter | None = None
        if self.config.log_std is LogStd.parameter:
            self.per_task_parameters = ("log_stds",)
            self.log_stds = nn.Parameter(torch.full(action_mask.shape, self.config.initial))

    @staticmethod
    def outputs(config: GaussianConfig, action_size: int) -> int:
        """Width of the network's output for ``A`` action dimensions."""
        return action_size if config.log_std is LogStd.parameter else 2 * action_size

    def with_network(self, network: nn.Module, action_mask: Tensor) -> GaussianActor:
        """The same kind of policy for another network, of the tasks in ``action_mask [T, A]``."""
        actor = GaussianActor(network, action_mask, self.config)
        actor.log_stds = self.log_stds
        return actor

    def split(self, outputs: Tensor, task_ids: TaskIds) -> tuple[Tensor, Tensor]:
        """Split the network's outputs ``[T, B, G]`` into mean and log standard deviation, each ``[T, B, A]``."""
        config = self.config
        if self.log_stds is None:
            mean, log_std = outputs.chunk(2, dim=-1)
            return mean, clamp_inward(log_std + config.initial, config.least, config.most)
        rows = task_rows(outputs, task_ids, len(self.log_stds))
        own = clamp_inward(rows.select(self.log_stds), config.least, config.most)
        return outputs, rows.restore(own.unsqueeze(1).expand_as(rows.x))

    def forward(self, obs: Tensor, task_ids: TaskIds) -> TanhNormal | ClippedNormal:
        """``obs [T, B, F]`` for all tasks in order to their action distributions."""
        mean, log_std = self.split(self.network(obs, task_ids), task_ids)
        kind = TanhNormal if self.config.policy is GaussianFamily.tanh_gaussian else ClippedNormal
        return kind(mean, log_std, self.action_mask)


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
Actor = GaussianActor | CategoricalActor
