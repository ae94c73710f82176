"""What PPO and SAC have in common: an actor and a critic, a step for each, and normalisers per task."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from varshare_rl.algorithms.base import AgentContext
from varshare_rl.data.normalizers import ObservationNormalizer
from varshare_rl.data.rewards import RewardScale, reward_scaler
from varshare_rl.nn.actor import Actor, PolicyDistribution
from varshare_rl.nn.critic import Critic
from varshare_rl.nn.parameters import shared_parameters
from varshare_rl.nn.stochastic import drawn_layers
from varshare_rl.nn.weight_sampler import Resample, WeightSampler
from varshare_rl.optim.absorption import Absorbing, absorb_all
from varshare_rl.optim.step import LossStep
from varshare_rl.types import Metrics, Scalars, Tree


class ActorCriticConfig(Protocol):
    """The options that every actor-critic algorithm has."""

    learning_rate: float
    critic_learning_rate: float
    max_grad_norm: float
    discount: float
    normalize_observations: bool
    reward_scale: RewardScale
    resets: int


#: A policy and its critic.
Networks = tuple[Actor, Critic]


class GreedyPolicy:
    """The mode of a policy, under the draws of ``elbo.draw.evaluation``.

    Args:
        actor: the policy of ``T`` tasks; normalizer: of its observations.
        mode: how the policy's weights are drawn.
        envs_per_task: environments that act side by side.
    """

    def __init__(
        self, actor: Actor, normalizer: ObservationNormalizer, mode: Resample, num_tasks: int, envs_per_task: int
    ) -> None:
        self.actor, self.normalizer = actor, normalizer
        self.task_ids = torch.arange(num_tasks)
        self.weight_sampler = WeightSampler(mode, actor, num_tasks, envs_per_task)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """``[T, E, F]`` to actions ``[T, E, ...]``."""
        with self.weight_sampler.sample(obs.shape[1]):
            distribution: PolicyDistribution = self.actor(self.normalizer(obs), self.task_ids)
            return distribution.mode()

    def observe(self, done: Tensor) -> None:
        """New episodes may get new draws."""
        self.weight_sampler.record(done)


class ActorCritic:
    """Actor, critic and what trains them, with their state.

    Subclasses say which passes of training draw anew (``training_draws``) and what ``elbo.draw.targets`` is about
    (``target_name``).

    Args:
        config: rates, clipping, discount, what is normalised, and how often networks start anew.
        learner: the problem, the network factory and the ELBO.
        build: makes a fresh policy and critic, on the problem's device.
        epsilon: Adam's epsilon.
    """

    training_draws: ClassVar[str]
    target_name: ClassVar[str]
    replays_draws: ClassVar[bool]  # whether updates of the actor need the draws that it acted with

    def __init__(
        self,
        config: ActorCriticConfig,
        context: AgentContext,
        build: Callable[[], Networks],
        epsilon: float = 1e-8,
    ) -> None:
        spec = context.spec
        self.spec, self.elbo, self.task_ids = spec, context.elbo, spec.task_ids
        self.regularizer = context.regularizer
        self.actor, self.critic = build()
        clip = config.max_grad_norm
        chosen = (context.optimizer, context.divergence_guard)
        self.actor_step = LossStep(self.actor, config.learning_rate, clip, epsilon, *chosen)
        self.critic_step = LossStep(self.critic, config.critic_learning_rate, clip, epsilon, *chosen)
        gradient = context.gradient
        self.actor_step.aggregate_by(gradient.actor, gradient, spec.num_tasks)
        self.critic_step.aggregate_by(gradient.critic, gradient, spec.num_tasks)
        self.normalizer = ObservationNormalizer(spec.num_tasks, spec.obs_size, config.normalize_observations).to(
            spec.device
        )
        self.reward_scaler = reward_scaler(config.reward_scale, spec.num_tasks, config.discount)
        self.reward_scaler.to(spec.device)
        self.weight_sampler = WeightSampler(
            self.elbo.config.draw.acting, self.actor, spec.num_tasks, spec.envs_per_task, self.replays_draws
        )
        self.absorbing = {
            "actor": Absorbing(self.actor, self.actor_step.optimizer),
            "critic": Absorbing(self.critic, self.critic_step.optimizer),
        }
        self.absorbed: Scalars = {}  # what the last absorption is to be logged with
        self.updates = 0
        self.resets_planned, self.resets_done, self.fraction = config.resets, 0, 0.0
        self._build = build

    def policy(self, obs: Tensor) -> PolicyDistribution:
        """The distribution over actions for normalised observations ``[T, B, F]``."""
        distribution: PolicyDistribution = self.actor(obs, self.task_ids)
        return distribution

    def evaluation_policy(self, envs_per_task: int) -> GreedyPolicy:
        """The mode of the policy."""
        mode = self.elbo.config.draw.evaluation
        return GreedyPolicy(self.actor, self.normalizer, mode, self.spec.num_tasks, envs_per_task)

    def weight_draws(self) -> str:
        """With which weights it acts, learns and is evaluated."""
        layer = next((layer for _, layer in drawn_layers(self.actor)), None)
        if layer is None:
            return "none: this network has no posteriors"
        draw = self.elbo.config.draw
        drawn = layer.weight_samples > 1 and layer.estimator in ("weight", "flipout")
        estimator = f"{layer.estimator}, {layer.weight_samples} samples" if drawn else layer.estimator
        return (
            f"acting {draw.acting.value}; training {self.training_draws} ({estimator}); "
            f"{self.target_name} {draw.targets.value}; evaluation {draw.evaluation.value}"
        )

    def advance(self, fraction: float) -> None:
        """Take note of the share of total_transitions that is done."""
        self.fraction = fraction
        self.elbo.advance(fraction)
        if self.regularizer is not None:
            self.regularizer.advance(fraction)
        self.actor_step.advance(fraction)
        self.critic_step.advance(fraction)

    def penalty(self, part: str, transitions_per_task: int) -> Tensor | float:
        """What is added to the losses of ``actor`` or ``critic``, ``[T]``: by the ELBO and the regulariser."""
        penalty = self.elbo.penalty(self.trained_modules()[part], transitions_per_task)
        if self.regularizer is None:
            return penalty
        return penalty + self.regularizer.penalty(part, transitions_per_task)

    def metrics(self) -> Metrics:
        """State of the controllers of the ELBO, and what the last absorption did."""
        absorbed = {name: float(value) for name, value in self.absorbed.items()}
        return self.elbo.metrics(self.trained_modules()) | absorbed

    def finish_update(self, updates_before: int) -> None:
        """Absorb the residuals' mean when ``elbo.absorb`` says so, and start networks anew when a reset is due.

        To be called at an update's end, for PPO after all epochs on a rollout: no action of the old networks waits
        to be learnt from then, and no ratio spans the change. Resets come after each of the ``resets + 1`` equal
        parts of the budget but the last.
        """
        self.reward_scaler.settle()
        config = self.elbo.config.absorb
        if config.due(updates_before, self.updates):
            self.absorbed = dict(absorb_all(self.absorbing, config))
        due = min(int(self.fraction * (self.resets_planned + 1) + 1e-9), self.resets_planned)
        if due > self.resets_done:
            self.resets_done = due
            self.reward_scaler.refresh()
            self.reset_networks()

    def reset_networks(self) -> None:
        """Fresh networks and steps; normalisers and what was collected stay (Nikishin et al. 2022)."""
        actor, critic = self._build()
        self.actor.load_state_dict(actor.state_dict())
        self.critic.renew(critic)
        for step in (self.actor_step, self.critic_step):
            step.forget()

    def masked_steps(self) -> Tensor:
        """Steps of actor and critic that each task was left out of, ``[T]``."""
        masked = torch.zeros(self.spec.num_tasks, dtype=torch.int64)
        for step in (self.actor_step, self.critic_step):
            if step.divergence_guard.masked is not None:
                masked += step.divergence_guard.masked.cpu()
        return masked

    def trained_modules(self) -> dict[str, nn.Module]:
        """Actor and critic."""
        return {"actor": self.actor, "critic": self.critic}

    def common_bytes(self, vector_steps: int = 0, share: float = 1.0) -> dict[str, int]:
        """Predicted bytes of what every training holds, without what there is none of.

        ``networks``: float32 parameters, their gradients and Adam's two moments; ``task gradients``: rows of
        gradients of the shared parameters that are combined, one per task; ``draws``: of the policy's weights,
        with ``vector_steps`` between updates. ``share`` of the tasks are in one update.
        """
        modules, spec = self.trained_modules().values(), self.spec
        steps = (self.actor_step, self.critic_step)
        sizes = [parameter.numel() for module in modules for parameter in module.parameters()]
        own = [role.parameter.numel() for step in steps for role in step.roles if role.own]
        held = {
            "networks": 4 * (4 * sum(sizes) - round((1.0 - share) * sum(own))),
            "task gradients": sum(step.reduction.memory_bytes(spec.num_tasks) for step in steps),
            "draws": self.weight_sampler.memory_bytes(vector_steps, spec.horizon),
        }
        return {name: size for name, size in held.items() if size}

    def policy_state(self) -> Tree:
        """Actor, critic, observation statistics, and the reward statistics that values are in units of."""
        return {
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "normalizer": self.normalizer.state_dict(),
            "reward_scaler": self.reward_scaler.state_dict(),
        }

    def load_policy_state(self, state: Tree) -> None:
        """Put back what :meth:`policy_state` gave."""
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        self.normalizer.load_state_dict(state["normalizer"])
        if "reward_scaler" in state:  # best checkpoints of earlier versions have none
            self.reward_scaler.restore(state["reward_scaler"])

    def take_over_critic(self, state: Tree) -> None:
        """Begin with parts of another critic's ``state_dict``, such as what its values are in units of."""
        self.critic.load_state_dict(self.critic.state_dict() | state)

    def state(self) -> Tree:
        """Networks, steps, normalisers and the number of updates."""
        return {
            **self.policy_state(),
            "elbo": self.elbo.state(),
            "draws": self.weight_sampler.state(),
            "actor_step": self.actor_step.state(),
            "critic_step": self.critic_step.state(),
            "updates": self.updates,
            "absorbed": {name: float(value) for name, value in self.absorbed.items()},
            "resets_done": self.resets_done,
        }

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.load_policy_state(state)
        self.elbo.load_state(state["elbo"])
        self.weight_sampler.load_state(state["draws"])
        self.actor_step.load_state(state["actor_step"])
        self.critic_step.load_state(state["critic_step"])
        self.updates = state["updates"]
        self.absorbed = state["absorbed"]
        self.resets_done = state["resets_done"]

    def measure_conflict(self) -> None:
        """Have the next update measure how the tasks' gradients of the shared parameters agree."""
        self.actor_step.measure_gram(shared_parameters(self.actor))
        self.critic_step.measure_gram(shared_parameters(self.critic))

    def gradient_grams(self) -> dict[str, Tensor]:
        """What was measured, by network: inner products of the tasks' gradients, ``[T, T]`` float64."""
        steps = {"actor": self.actor_step, "critic": self.critic_step}
        return {name: step.gram for name, step in steps.items() if step.gram is not None}
