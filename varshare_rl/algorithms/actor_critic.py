"""What PPO and SAC have in common: an actor and a critic, a step for each, and normalisers per task."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from varshare_rl.algorithms.base import Learner
from varshare_rl.data.normalizers import ObservationNormalizer, RewardNormalizer
from varshare_rl.nn.actor import CategoricalActor, TanhGaussianActor
from varshare_rl.nn.stochastic import posterior_mean
from varshare_rl.optim.step import LossStep
from varshare_rl.types import Tree


class ActorCriticOptions(Protocol):
    """The options that every actor-critic algorithm has."""

    learning_rate: float
    critic_learning_rate: float
    max_grad_norm: float
    discount: float
    normalize_observations: bool
    normalize_rewards: bool


class ActorCritic:
    """Actor, critic and what trains them, with their state.

    Args:
        options: rates, clipping, discount, and what is normalised.
        learner: the problem, the network factory and the ELBO.
        actor: the policy, on the problem's device.
        critic: the value network or networks, likewise.
        epsilon: Adam's epsilon.
    """

    def __init__(
        self,
        options: ActorCriticOptions,
        learner: Learner,
        actor: TanhGaussianActor | CategoricalActor,
        critic: nn.Module,
        epsilon: float = 1e-8,
    ) -> None:
        problem = learner.problem
        self.problem, self.elbo, self.task_ids = problem, learner.elbo, problem.task_ids
        self.actor, self.critic = actor, critic
        clip = options.max_grad_norm
        chosen = (learner.optimizer, learner.guard)
        self.actor_step = LossStep(actor, options.learning_rate, clip, epsilon, *chosen)
        self.critic_step = LossStep(critic, options.critic_learning_rate, clip, epsilon, *chosen)
        gradient = learner.gradient
        self.actor_step.combine_by(gradient.actor, gradient, problem.num_tasks)
        self.critic_step.combine_by(gradient.critic, gradient, problem.num_tasks)
        self.normalizer = ObservationNormalizer(
            problem.num_tasks, problem.obs_size, options.normalize_observations
        ).to(problem.device)
        self.reward_normalizer = RewardNormalizer(
            problem.num_tasks, options.discount, options.normalize_rewards
        ).to(problem.device)
        self.updates = 0

    @torch.no_grad()
    def act_greedily(self, obs: Tensor) -> Tensor:
        """The mode of the policy on the posterior mean."""
        with posterior_mean(self.actor):
            action: Tensor = self.actor(self.normalizer(obs), self.task_ids).mode()
        return action

    def advance(self, fraction: float) -> None:
        """Take note of the share of total_transitions that is done."""
        self.actor_step.advance(fraction)
        self.critic_step.advance(fraction)

    def masked_steps(self) -> Tensor:
        """Steps of actor and critic that each task was left out of, ``[T]``."""
        masked = torch.zeros(self.problem.num_tasks, dtype=torch.int64)
        for step in (self.actor_step, self.critic_step):
            if step.guard.masked is not None:
                masked += step.guard.masked.cpu()
        return masked

    def trained_modules(self) -> dict[str, nn.Module]:
        """Actor and critic."""
        return {"actor": self.actor, "critic": self.critic}

    def trained_bytes(self) -> int:
        """Bytes of float32 parameters, their gradients and Adam's two moments."""
        modules = self.trained_modules().values()
        return 4 * 4 * sum(parameter.numel() for module in modules for parameter in module.parameters())

    def policy_state(self) -> Tree:
        """Actor, critic and observation statistics."""
        return {
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "normalizer": self.normalizer.state_dict(),
        }

    def load_policy_state(self, state: Tree) -> None:
        """Put back what :meth:`policy_state` gave."""
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        self.normalizer.load_state_dict(state["normalizer"])

    def state(self) -> Tree:
        """Networks, steps, normalisers and the number of updates."""
        return {
            **self.policy_state(),
            "reward_normalizer": self.reward_normalizer.state_dict(),
            "actor_step": self.actor_step.state(),
            "critic_step": self.critic_step.state(),
            "updates": self.updates,
        }

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.load_policy_state(state)
        self.reward_normalizer.returns = state["reward_normalizer"]["returns"].to(self.problem.device)
        self.reward_normalizer.load_state_dict(state["reward_normalizer"])
        self.actor_step.load_state(state["actor_step"])
        self.critic_step.load_state(state["critic_step"])
        self.updates = state["updates"]
