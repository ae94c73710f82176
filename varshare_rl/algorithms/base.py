"""What the loop asks of an algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from varshare_rl.nn.actor import Actor, CategoricalActor, TanhGaussianActor
from varshare_rl.nn.critic import CriticConfig, TwinQ, ValueNetwork
from varshare_rl.optim.divergence_guard import DivergenceGuardConfig
from varshare_rl.optim.elbo import Elbo
from varshare_rl.optim.gradient import GradientConfig
from varshare_rl.optim.optimizer import OptimizerConfig
from varshare_rl.types import Metrics, Scalars, Transition, Tree

#: Builds a task network from its input and output size.
NetworkFactory = Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class TaskSpec:
    """What an algorithm must know of the tasks, and where it computes."""

    num_tasks: int
    envs_per_task: int
    obs_size: int
    action_size: int  # dimensions of a Box, choices of a Discrete space
    discrete: bool
    action_mask: Tensor  # [T, A] bool
    device: torch.device
    horizon: int  # the longest episode in steps

    @property
    def task_ids(self) -> Tensor:
        """All task ids in order, on the CPU."""
        return torch.arange(self.num_tasks)


class EvaluationPolicy(Protocol):
    """Acts without exploring, in as many environments per task as it was made for."""

    def act(self, obs: Tensor) -> Tensor:
        """Deterministic actions for ``obs [T, E, F]``, under the weights that evaluation uses."""

    def observe(self, done: Tensor) -> None:
        """Take note of the episodes that have ended, ``[T, E]``."""


class Algorithm(Protocol):
    """Acts, takes in transitions, and updates when it is ready. The loop knows no more than this."""

    updates: int  # gradient updates so far

    def act(self, obs: Tensor) -> Tensor:
        """Exploratory actions for ``obs [T, E, F]``: ``[T, E, A]``, or ``[T, E]`` int64.

        May be called for parts of the environments in turn; they are observed together.
        """

    def observe(self, transition: Transition) -> None:
        """Take in the outcome of all that was acted since the last call, ``[T, E, ...]``."""

    def advance(self, fraction: float) -> None:
        """Take note of the share of total_transitions that is done."""

    def ready(self) -> bool:
        """Whether an update is due."""

    def update(self) -> Scalars:
        """One update (for PPO: all epochs on one rollout); returns scalars to log."""

    def evaluation_policy(self, envs_per_task: int) -> EvaluationPolicy:
        """What is evaluated, for so many environments of every task."""

    def weight_draws(self) -> str:
        """With which weights it acts, learns and is evaluated, in words for the log."""

    def metrics(self) -> Metrics:
        """State of what controls the training, for the log."""

    def masked_steps(self) -> Tensor:
        """Gradient steps that each task was left out of because its loss had diverged, ``[T]`` on the CPU."""

    def trained_modules(self) -> dict[str, nn.Module]:
        """The networks that are trained, by name."""

    def measure_conflict(self) -> None:
        """Have the next update measure :meth:`gradient_grams`; it must not change the update."""

    def gradient_grams(self) -> dict[str, Tensor]:
        """Inner products ``[T, T]`` of the tasks' gradients of shared parameters by network, as last measured."""

    def memory_bytes(self) -> dict[str, int]:
        """Predicted bytes of what training holds, by what it is for."""

    def policy_state(self) -> Tree:
        """What :meth:`evaluation_policy` needs, the critic, and what its values are in units of."""

    def load_policy_state(self, state: Tree) -> None:
        """Put back what :meth:`policy_state` gave."""

    def state(self) -> Tree:
        """Everything needed to go on bit for bit, except torch's global random state."""

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""


def build_actor(
    spec: TaskSpec,
    make_network: NetworkFactory,
    log_std_range: tuple[float, float],
    initial_log_std: float,
) -> Actor:
    """The policy that fits the action space, on the problem's device."""
    actor: Actor
    if spec.discrete:
        actor = CategoricalActor(make_network(spec.obs_size, spec.action_size), spec.action_mask)
    else:
        network = make_network(spec.obs_size, 2 * spec.action_size)
        actor = TanhGaussianActor(network, spec.action_mask, log_std_range, initial_log_std)
    return actor.to(spec.device)


class Regularizer(Protocol):
    """What takes part in the training of an algorithm's networks beside the losses, such as a continual-learning
    method. Parts are ``actor`` and ``critic``."""

    def penalty(self, part: str, transitions_per_task: int) -> Tensor | float:
        """What is added to the losses of a part, ``[T]``; they average over so many transitions per task."""

    def advance(self, fraction: float) -> None:
        """Take note of the share of total_transitions that is done."""


@dataclass(frozen=True)
class AgentContext:
    """What every algorithm is built from besides its own options."""

    spec: TaskSpec
    make_network: NetworkFactory
    elbo: Elbo
    critic: CriticConfig = field(default_factory=CriticConfig)
    make_critic_network: NetworkFactory | None = None  # None: as make_network
    gradient: GradientConfig = field(default_factory=GradientConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    divergence_guard: DivergenceGuardConfig = field(default_factory=DivergenceGuardConfig)
    regularizer: Regularizer | None = None

    def value_network(self) -> ValueNetwork:
        """A fresh state value, on the problem's device."""
        network = self._critic_network(self.spec.obs_size)
        return ValueNetwork(network, self.spec.num_tasks, self.critic).to(self.spec.device)

    def twin_critic(self) -> TwinQ:
        """Fresh twin action values, on the problem's device."""
        size = self.spec.obs_size + self.spec.action_size
        twins = TwinQ(lambda: self._critic_network(size), self.spec.num_tasks, self.critic)
        return twins.to(self.spec.device)

    def _critic_network(self, in_features: int) -> nn.Module:
        return (self.make_critic_network or self.make_network)(in_features, self.critic.outputs)
