"""What PPO and SAC have in common: an actor and a critic, a step for each, and normalisers per task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from varshare_rl.algorithms.base import Learner
from varshare_rl.data.normalizers import ObservationNormalizer
from varshare_rl.data.rewards import RewardScale, reward_scaler
from varshare_rl.nn.actor import CategoricalActor, TanhGaussianActor
from varshare_rl.nn.critic import Critic
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
    reward_scale: RewardScale
    resets: int


#: A policy and its critic.
Networks = tuple[TanhGaussianActor | CategoricalActor, Critic]


class ActorCritic:
    """Actor, critic and what trains them, with their state.

    Args:
        options: rates, clipping, discount, what is normalised, and how often networks start anew.
        learner: the problem, the network factory and the ELBO.
        build: makes a fresh policy and critic, on the problem's device.
        epsilon: Adam's epsilon.
    """

    def __init__(
        self,
        options: ActorCriticOptions,
        learner: Learner,
        build: Callable[[], Networks],
        epsilon: float = 1e-8,
    ) -> None:
        problem = learner.problem
        self.problem, self.elbo, self.task_ids = problem, learner.elbo, problem.task_ids
        self.actor, self.critic = build()
        clip = options.max_grad_norm
        self.actor_step = LossStep(list(self.actor.parameters()), options.learning_rate, clip, epsilon)
        self.critic_step = LossStep(list(self.critic.parameters()), options.critic_learning_rate, clip, epsilon)
        self.normalizer = ObservationNormalizer(
            problem.num_tasks, problem.obs_size, options.normalize_observations
        ).to(problem.device)
        self.reward_scaler = reward_scaler(options.reward_scale, problem.num_tasks, options.discount)
        self.reward_scaler.to(problem.device)
        self.updates = 0
        self.resets_planned, self.resets_done, self.fraction = options.resets, 0, 0.0
        self._build = build

    @torch.no_grad()
    def act_greedily(self, obs: Tensor) -> Tensor:
        """The mode of the policy on the posterior mean."""
        with posterior_mean(self.actor):
            action: Tensor = self.actor(self.normalizer(obs), self.task_ids).mode()
        return action

    def advance(self, fraction: float) -> None:
        """Take note of the share of total_transitions that is done."""
        self.fraction = fraction

    def finish_update(self) -> None:
        """Start networks anew after each of the ``resets + 1`` equal parts of the budget but the last.

        To be called at an update's end: no action of the old networks waits to be learnt from then.
        """
        self.reward_scaler.settle()
        due = min(int(self.fraction * (self.resets_planned + 1) + 1e-9), self.resets_planned)
        if due > self.resets_done:
            self.resets_done = due
            self.reward_scaler.refresh()
            self.reset_networks()

    def reset_networks(self) -> None:
        """Fresh networks and optimiser moments; normalisers and what was collected stay (Nikishin et al. 2022)."""
        actor, critic = self._build()
        self.actor.load_state_dict(actor.state_dict())
        self.critic.renew(critic)
        for step in (self.actor_step, self.critic_step):
            step.optimizer.state.clear()

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
        """Networks, optimisers, normalisers and the number of updates."""
        return {
            **self.policy_state(),
            "reward_scaler": self.reward_scaler.state_dict(),
            "actor_optimizer": self.actor_step.optimizer.state_dict(),
            "critic_optimizer": self.critic_step.optimizer.state_dict(),
            "updates": self.updates,
            "resets_done": self.resets_done,
        }

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.load_policy_state(state)
        self.reward_scaler.restore(state["reward_scaler"])
        self.actor_step.optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_step.optimizer.load_state_dict(state["critic_optimizer"])
        self.updates = state["updates"]
        self.resets_done = state["resets_done"]
