"""The common part of PPO and SAC: an actor and a critic, a step for each, and normalisers per task."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from varshare_rl.algorithms.base import AgentContext, Algorithm
from varshare_rl.data.normalizers import ObservationNormalizer, ObservationStatistics, RewardScale, reward_scaler
from varshare_rl.errors import UserError
from varshare_rl.nn.action_noise import ActionNoise
from varshare_rl.nn.actor import Actor, PolicyDistribution
from varshare_rl.nn.critic import Critic
from varshare_rl.nn.parameters import shared_parameters
from varshare_rl.nn.stochastic import drawn_layers
from varshare_rl.nn.weight_sampler import Resample, WeightSampler
from varshare_rl.optim.absorption import Absorbing, absorb_all
from varshare_rl.optim.elbo import Likelihood, Penalized
from varshare_rl.optim.step import LossStep
from varshare_rl.types import Metrics, Tree


class ActorCriticConfig(Protocol):
    """The options that every actor-critic algorithm has."""

    learning_rate: float
    critic_learning_rate: float
    max_grad_norm: float
    discount: float
    noise_correlation: float
    normalize_observations: bool
    observation_statistics: ObservationStatistics
    min_observation_std: float
    resets: int

    @property
    def reward_scale(self) -> RewardScale | None:
        """Divisor of rewards; None: by what the critic has."""


#: A policy and its critic.
Networks = tuple[Actor, Critic]


class ActorPolicy:
    """An actor that is evaluated: its mode or its draws, with weights drawn as ``elbo.draw.evaluation`` says.

    Args:
        actor: the policy of ``T`` tasks; normalizer: of its observations.
        mode: how the policy's weights are drawn.
        envs_per_task: environments that act side by side.
        noise: of the actions, which are drawn; None: actions are the distribution's mode.
    """

    def __init__(
        self,
        actor: Actor,
        normalizer: ObservationNormalizer,
        mode: Resample,
        num_tasks: int,
        envs_per_task: int,
        noise: ActionNoise | None = None,
    ) -> None:
        self.actor, self.normalizer, self.noise = actor, normalizer, noise
        self.task_ids = torch.arange(num_tasks)
        self.weight_sampler = WeightSampler(mode, actor, num_tasks, envs_per_task)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Return actions ``[T, E, ...]`` for ``[T, E, F]``."""
        with self.weight_sampler.sample(obs.shape[1]):
            distribution: PolicyDistribution = self.actor(self.normalizer(obs), self.task_ids)
            if self.noise is None:
                return distribution.mode()
            return distribution.sample(self.noise.draw(obs.shape[1])).action

    def observe(self, done: Tensor) -> None:
        """Take note of the episodes that have ended; new ones may get new draws."""
        self.weight_sampler.record(done)
        if self.noise is not None:
            self.noise.record(done.to(self.noise.going_on.device))


class ActorCritic(Algorithm):
    """Actor, critic and what trains them, with their state.

    Subclasses say which passes of training draw anew (``training_draws``) and what ``elbo.draw.targets`` is about
    (``target_name``).

    Args:
        config: rates, clipping, discount, noise, what is normalised, and how often networks start anew.
        context: the tasks, the network factory and the ELBO.
        build: makes a fresh policy and critic, on the device of the tasks.
        epsilon: Adam's epsilon.
        log_temperature: ``[T]``, what the aggregator ``softmax_temperature`` weighs tasks by.
    """

    training_draws: ClassVar[str]
    target_name: ClassVar[str]
    replays_draws: ClassVar[bool]  # updates of the actor need the draws that it acted with
    #: Best checkpoints of earlier versions have no reward_scaler.
    policy_fields: ClassVar[tuple[str, ...]] = ("actor", "critic", "normalizer", "reward_scaler?")
    state_fields: ClassVar[tuple[str, ...]] = (
        *policy_fields, "elbo", "draws=weight_sampler", "actor_step", "critic_step", "updates", "absorbed",
        "resets_done", "transitions_per_task?", "action_noise?",
    )  # fmt: skip

    def __init__(
        self,
        config: ActorCriticConfig,
        context: AgentContext,
        build: Callable[[], Networks],
        epsilon: float = 1e-8,
        log_temperature: Tensor | None = None,
    ) -> None:
        spec = context.spec
        self.spec, self.elbo, self.task_ids = spec, context.elbo, spec.task_ids
        self.regularizer, self.ranks = context.regularizer, context.ranks
        self.actor, self.critic = build()
        step = partial(
            LossStep, max_grad_norm=config.max_grad_norm, epsilon=epsilon, optimizer=context.optimizer,
            divergence_guard=context.divergence_guard, gradient=context.gradient, num_tasks=spec.num_tasks,
            log_temperature=log_temperature, ranks=context.ranks,
        )  # fmt: skip
        self.actor_step = step(self.actor, config.learning_rate, aggregator=context.gradient.actor)
        self.critic_step = step(self.critic, config.critic_learning_rate, aggregator=context.gradient.critic)
        self.normalizer = ObservationNormalizer(
            spec.num_tasks, spec.obs_size, config.normalize_observations, config.min_observation_std
        ).to(spec.device)
        if config.observation_statistics is ObservationStatistics.suite:
            if spec.obs_scale is None:
                raise UserError(
                    "algorithm.observation_statistics=suite needs a suite that knows the scales of its "
                    "observations, such as metaworld; give running"
                )
            self.normalizer.fix(*spec.obs_scale)
        units = RewardScale.return_std if self.critic.statistics is None else RewardScale.none
        self.reward_scaler = reward_scaler(config.reward_scale or units, spec.num_tasks, config.discount)
        self.reward_scaler.to(spec.device)
        self.weight_sampler = WeightSampler(
            self.elbo.config.draw.acting, self.actor, spec.num_tasks, spec.envs_per_task, self.replays_draws
        )
        if config.noise_correlation and spec.discrete:
            raise UserError(
                f"algorithm.noise_correlation={config.noise_correlation:g} is for Box actions, and these are "
                "Discrete; leave it out"
            )
        shape = (spec.num_tasks, spec.envs_per_task, spec.action_size)
        self.action_noise = ActionNoise(config.noise_correlation, shape, spec.device)
        self.absorbing = {
            "actor": Absorbing(self.actor, self.actor_step.optimizers),
            "critic": Absorbing(self.critic, self.critic_step.optimizers),
        }
        self.absorbed: Metrics = {}  # of the last absorption, for the log
        self.updates = self.transitions_per_task = 0
        self.resets_planned, self.resets_done, self.fraction = config.resets, 0, 0.0
        self._build = build

    def policy(self, obs: Tensor) -> PolicyDistribution:
        """Return the distribution over actions for normalised observations ``[T, B, F]``."""
        distribution: PolicyDistribution = self.actor(obs, self.task_ids)
        return distribution

    def penalty(self, part: str, held: int, nat: Tensor | float = 1.0) -> Tensor | float:
        """Return what ELBO and regulariser add to the losses of ``actor`` or ``critic``, ``[T]``.

        ``held``: transitions of a task that the rollout or the replay holds; ``nat``: what a nat of the likelihood
        is in the loss, ``[T]``.
        """
        actor = part == "actor"
        module, step = (self.actor, self.actor_step) if actor else (self.critic, self.critic_step)
        seen = self.transitions_per_task
        penalized = self.elbo.config.networks in (Penalized.both, Penalized(part))
        penalty = self.elbo.penalty(module, held, seen) if penalized else 0.0
        nat = nat if self.elbo.config.likelihood is Likelihood.fitted else 1.0
        if isinstance(penalty, Tensor):
            penalty = penalty * nat
        if step.ivon is not None:
            step.ivon.pay(self.elbo.price(module, held, seen) * nat)
        if self.regularizer is None:
            return penalty
        return penalty + self.regularizer.penalty(part, held)

    def evaluation_policy(self, envs_per_task: int, deterministic: bool = True) -> ActorPolicy:
        noise = None if deterministic else self.action_noise.like(envs_per_task)
        mode = self.elbo.config.draw.evaluation
        return ActorPolicy(self.actor, self.normalizer, mode, self.spec.num_tasks, envs_per_task, noise)

    def weight_draws(self) -> str:
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

    def end_episodes(self, ended: Tensor) -> None:
        self.reward_scaler.end(ended)
        self.weight_sampler.end(ended)
        self.action_noise.end(ended)

    def advance(self, fraction: float) -> None:
        self.fraction = fraction
        self.elbo.advance(fraction)
        if self.regularizer is not None:
            self.regularizer.advance(fraction)
        self.actor_step.advance(fraction)
        self.critic_step.advance(fraction)

    def metrics(self) -> Metrics:
        steps = {"actor": self.actor_step, "critic": self.critic_step}
        sizes = {
            f"optimizer/{name}_{role}_step": size
            for name, step in steps.items()
            for role, size in step.scheduled.mean_steps().items()
        }
        rates = {f"optimizer/{name}_rate_factor": step.scheduled.current_factor for name, step in steps.items()}
        return self.elbo.metrics(self.trained_modules()) | self.absorbed | sizes | rates

    def finish_update(self, updates_before: int) -> None:
        """Absorb the residuals' mean when ``elbo.absorb`` says so, and start networks anew when a reset is due.

        To be called at an update's end, for PPO after all epochs on a rollout: no action of the old networks waits
        to be learnt from then, and no ratio spans the change. Resets come after each of the ``resets + 1`` equal
        parts of the budget but the last.
        """
        absorb = self.elbo.config.absorb
        if absorb.every and absorb.due(updates_before, self.updates):
            self.absorbed = absorb_all(self.absorbing, absorb)
        due = self._resets_due()
        if due > self.resets_done:
            self.resets_done = due
            self.reward_scaler.refresh()
            self.reset_networks()

    def _resets_due(self) -> int:
        return min(int(self.fraction * (self.resets_planned + 1) + 1e-9), self.resets_planned)

    def branch(self, fraction: float) -> None:
        """Have the rates of the options, whatever had slowed the other run down; resets due before are past."""
        self.fraction = fraction
        self.resets_done = self._resets_due()
        for step in self.steps():
            step.rate_factor = 1.0

    def steps(self) -> list[LossStep]:
        """All that step parameters."""
        return [self.actor_step, self.critic_step]

    def reset_networks(self) -> None:
        """Start networks and steps anew; normalisers and experience stay (Nikishin et al. 2022)."""
        actor, critic = self._build()
        self.actor.load_state_dict(actor.state_dict())
        self.critic.renew(critic)
        for step in (self.actor_step, self.critic_step):
            step.forget()

    def masked_steps(self) -> Tensor:
        masked = torch.zeros(self.spec.num_tasks, dtype=torch.int64)
        for step in (self.actor_step, self.critic_step):
            if step.divergence_guard.masked is not None:
                masked += step.divergence_guard.masked.cpu()
        return masked

    def idle_steps(self) -> int:
        return max(step.divergence_guard.idle for step in (self.actor_step, self.critic_step))

    def slow_down(self, factor: float) -> None:
        for step in self.steps():
            step.rate_factor *= factor

    def trained_modules(self) -> dict[str, nn.Module]:
        return {"actor": self.actor, "critic": self.critic}

    def common_bytes(self, vector_steps: int = 0, share: float = 1.0) -> dict[str, int]:
        """Predict the bytes that PPO and SAC both hold, without what there is none of.

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
            "task gradients": sum(step.aggregation.memory_bytes(spec.num_tasks) for step in steps),
            "draws": self.weight_sampler.memory_bytes(vector_steps, spec.horizon),
        }
        return {name: size for name, size in held.items() if size}

    def largest_product(self) -> int:
        modules = self.trained_modules().values()
        weights = [math.prod(p.shape[-2:]) for module in modules for p in module.parameters() if p.dim() > 1]
        return self.rows_per_update() * max(weights, default=0)

    @abstractmethod
    def rows_per_update(self) -> int:
        """Return the transitions, of all tasks together, that an update's products have as rows."""

    def policy_state(self) -> Tree:
        return self.declared_state("policy_fields")

    def load_policy_state(self, state: Tree) -> None:
        self.load_declared_state(state, "policy_fields")

    def take_over_critic(self, state: Tree) -> None:
        """Begin with parts of another critic's ``state_dict``, such as what its values are in units of."""
        self.critic.load_state_dict(self.critic.state_dict() | state)

    def measure_conflict(self) -> None:
        self.actor_step.measure_gram(shared_parameters(self.actor))
        self.critic_step.measure_gram(shared_parameters(self.critic))

    def gradient_grams(self) -> dict[str, Tensor]:
        steps = {"actor": self.actor_step, "critic": self.critic_step}
        return {name: step.gram for name, step in steps.items() if step.gram is not None}
