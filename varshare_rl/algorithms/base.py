"""The interface of the loop to an algorithm, and the parts that every algorithm is built from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from varshare_rl.nn.actor import Actor, CategoricalActor, GaussianActor, GaussianConfig
from varshare_rl.nn.critic import CriticConfig, TwinQ, ValueNetwork
from varshare_rl.optim.divergence_guard import DivergenceGuardConfig
from varshare_rl.optim.elbo import Elbo
from varshare_rl.optim.gradient import GradientConfig
from varshare_rl.optim.optimizer import OptimizerConfig
from varshare_rl.ranks import ALONE, Ranks
from varshare_rl.state import Stateful
from varshare_rl.types import Metrics, Scalars, Transition, Tree

#: Builds a task network from its input and output size.
NetworkFactory = Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class TaskSpec:
    """Sizes of the tasks as an algorithm must know them, and the device it computes on."""

    num_tasks: int
    envs_per_task: int
    obs_size: int
    action_size: int  # dimensions of a Box, choices of a Discrete space
    discrete: bool
    action_mask: Tensor  # [T, A] bool
    device: torch.device
    horizon: int  # the longest episode in steps
    obs_scale: tuple[Tensor, Tensor] | None = None  # mean and standard deviation [F] that the suite knows

    @property
    def task_ids(self) -> Tensor:
        """All task ids in order, on the CPU."""
        return torch.arange(self.num_tasks)


class EvaluationPolicy(Protocol):
    """Acts in as many environments per task as it was made for; learns nothing."""

    def act(self, obs: Tensor) -> Tensor:
        """Actions for ``obs [T, E, F]``, under the weights that evaluation uses."""

    def observe(self, done: Tensor) -> None:
        """Take note of the episodes that have ended, ``[T, E]``."""


class Algorithm(Stateful, ABC):
    """Acts, takes in transitions, and updates when it is ready. The loop knows no more than this."""

    updates: int  # gradient updates so far

    @abstractmethod
    def act(self, obs: Tensor) -> Tensor:
        """Return exploratory actions for ``obs [T, E, F]``: ``[T, E, A]``, or ``[T, E]`` int64.

        May be called for parts of the environments in turn; they are observed together.
        """

    @abstractmethod
    def observe(self, transition: Transition) -> None:
        """Take in the outcome of all that was acted since the last call, ``[T, E, ...]``."""

    def end_episodes(self, ended: Tensor) -> None:
        """Take note of episodes ``[T, E]`` that are cut off after what was last observed."""

    @abstractmethod
    def advance(self, fraction: float) -> None:
        """Take note of the share of total_transitions that is done."""

    @abstractmethod
    def ready(self) -> bool:
        """Return True when an update is due."""

    @abstractmethod
    def update(self) -> Scalars:
        """Make one update (for PPO: all epochs on one rollout); returns scalars to log."""

    @abstractmethod
    def evaluation_policy(self, envs_per_task: int, deterministic: bool = True) -> EvaluationPolicy:
        """Return the policy to evaluate, for so many environments of every task.

        ``deterministic``: it takes the most likely actions; else it draws them, with the noise of training.
        """

    @abstractmethod
    def weight_draws(self) -> str:
        """Name the weights that it acts, learns and is evaluated with, in words for the log."""

    def description(self) -> dict[str, str]:
        """Say what a user should know of its updates before they begin, by heading."""
        return {}

    @abstractmethod
    def metrics(self) -> Metrics:
        """Return the state of the controllers of training, for the log."""

    @abstractmethod
    def masked_steps(self) -> Tensor:
        """Count the steps that each task was left out of because its loss had diverged, ``[T]`` on the CPU."""

    @abstractmethod
    def idle_steps(self) -> int:
        """Count the steps in a row, up to now, that every task was left out of, of the network with the most."""

    def branch(self, fraction: float) -> None:
        """Take note that a new run begins with what was loaded, at a share of its budget."""

    @abstractmethod
    def slow_down(self, factor: float) -> None:
        """Multiply all learning rates from now on."""

    @abstractmethod
    def trained_modules(self) -> dict[str, nn.Module]:
        """Return the networks that are trained, by name."""

    @abstractmethod
    def measure_conflict(self) -> None:
        """Have the next update measure :meth:`gradient_grams`; it must not change the update."""

    @abstractmethod
    def gradient_grams(self) -> dict[str, Tensor]:
        """Return inner products ``[T, T]`` of the tasks' shared gradients by network, as last measured."""

    @abstractmethod
    def memory_bytes(self) -> dict[str, int]:
        """Predict the bytes of everything training holds, by its purpose."""

    def own_state(self) -> Tree:
        """Return the entries of :meth:`state` that each rank has its own of."""
        return {}

    @abstractmethod
    def largest_product(self) -> int:
        """Return the multiplications in the largest product of an update."""

    @abstractmethod
    def policy_state(self) -> Tree:
        """Return the state of policy and critic, and of the units of its values."""

    @abstractmethod
    def load_policy_state(self, state: Tree) -> None:
        """Put back what :meth:`policy_state` gave."""


def build_actor(spec: TaskSpec, make_network: NetworkFactory, gaussian: GaussianConfig) -> Actor:
    """Return the policy that fits the action space, on the device of the tasks; ``gaussian`` is for Box actions."""
    actor: Actor
    if spec.discrete:
        actor = CategoricalActor(make_network(spec.obs_size, spec.action_size), spec.action_mask)
    else:
        network = make_network(spec.obs_size, GaussianActor.outputs(gaussian, spec.action_size))
        actor = GaussianActor(network, spec.action_mask, gaussian)
    return actor.to(spec.device)


class Regularizer(Protocol):
    """A part in the training of an algorithm's networks beside the losses, such as a continual-learning method.

    Parts are ``actor`` and ``critic``."""

    def penalty(self, part: str, transitions_per_task: int) -> Tensor | float:
        """Return the addition to the losses of a part, ``[T]``; they average over so many transitions per task."""

    def advance(self, fraction: float) -> None:
        """Take note of the share of total_transitions that is done."""


@dataclass(frozen=True)
class AgentContext:
    """Everything that an algorithm is built from besides its own options."""

    spec: TaskSpec
    make_network: NetworkFactory
    elbo: Elbo
    critic: CriticConfig = field(default_factory=CriticConfig)
    make_critic_network: NetworkFactory | None = None  # None: as make_network
    gradient: GradientConfig = field(default_factory=GradientConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    divergence_guard: DivergenceGuardConfig = field(default_factory=DivergenceGuardConfig)
    regularizer: Regularizer | None = None
    ranks: Ranks = ALONE

    def value_network(self) -> ValueNetwork:
        """Return a fresh state value, on the device of the tasks."""
        network = self._critic_network(self.spec.obs_size)
        return ValueNetwork(network, self.spec.num_tasks, self.critic).to(self.spec.device)

    def twin_critic(self) -> TwinQ:
        """Return fresh twin action values, on the device of the tasks."""
        size = self.spec.obs_size + self.spec.action_size
        twins = TwinQ(lambda: self._critic_network(size), self.spec.num_tasks, self.critic)
        return twins.to(self.spec.device)

    def _critic_network(self, in_features: int) -> nn.Module:
        return (self.make_critic_network or self.make_network)(in_features, self.critic.outputs)
