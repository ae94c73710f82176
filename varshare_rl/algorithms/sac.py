"""Soft actor-critic (Haarnoja et al. 2018), everything per task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from varshare_rl.algorithms.actor_critic import ActorCritic, Networks
from varshare_rl.algorithms.base import AgentContext, build_actor
from varshare_rl.data.replay import ReplayBatch, ReplayBuffer
from varshare_rl.data.rewards import RewardScale
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.critic import TwinQ
from varshare_rl.nn.parameters import frozen, rho_parameters
from varshare_rl.nn.stochastic import theta_only
from varshare_rl.nn.weight_sampler import drawn_once
from varshare_rl.ops.returns import td_target
from varshare_rl.optim.elbo import TargetDraw
from varshare_rl.optim.gradient import TEMPERATURE
from varshare_rl.optim.step import LossStep
from varshare_rl.optim.task_subset import TaskSubset
from varshare_rl.registry import register
from varshare_rl.types import Scalars, Transition, Tree


@register("algorithm", "sac")
@dataclass
class SACConfig:
    """``algorithm=sac``: soft actor-critic (Haarnoja et al. 2018). Sizes are per task."""

    name: str = "sac"
    replay_capacity_per_task: int = bounded(100_000, least=1)
    "Transitions of every task that the replay holds."
    batch_per_task: int = bounded(128, least=1)
    "Transitions of every task in an update."
    tasks_per_update: int | None = bounded(None, least=1)
    "Tasks that an update is of, in turn; null: all."
    start_transitions_per_task: int = bounded(1_000, least=1)
    "Transitions of every task with uniformly random actions, before learning starts."
    updates_per_transition_per_task: float = bounded(0.5, least=0)
    "Gradient updates for each transition of a task."
    learning_rate: float = bounded(1e-3, least=0)
    "Learning rate of the actor."
    critic_learning_rate: float = bounded(1e-3, least=0)
    "Learning rate of the critics."
    entropy_learning_rate: float = bounded(1e-3, least=0)
    "Learning rate of every task's entropy coefficient."
    discount: float = bounded(0.99, least=0, most=1)
    "Factor on the value of the next step."
    target_rate: float = bounded(0.005, least=0, most=1)
    "Share by which the target critics follow at every update."
    initial_entropy_coefficient: float = bounded(1.0, least=0)
    "Entropy coefficient that every task starts with."
    target_entropy_per_dimension: float = -1.0
    "Entropy that a task's coefficient holds its policy at, for each dimension of its actions."
    max_grad_norm: float = bounded(1.0, least=0)
    "Bound on the norm of the combined gradient; 0: none."
    normalize_observations: bool = False
    "Whether observations are normalised by running statistics of each task."
    reward_scale: RewardScale = RewardScale.none
    """What rewards are divided by: nothing; the deviation of the task's return (`return_std`); or the task's mean
    reward over the largest one of a task (`ars`)."""
    resets: int = bounded(0, least=0)
    "Times that networks start anew, spread evenly over the budget; the replay stays."

    def build(self, context: AgentContext) -> SAC:
        """The algorithm. Raises UserError if the actions are discrete."""
        return SAC(self, context)


class CriticStep(NamedTuple):
    """What a step of the critics was about."""

    losses: Tensor  # [T]
    target: Tensor  # [T, B]
    value: Tensor  # mean of both critics
    grad_norm: Tensor


class SAC(ActorCritic):
    """SAC with twin critics and an entropy coefficient per task.

    Every update draws weights anew, once for all its passes where the estimator allows
    (:func:`~varshare_rl.nn.weight_sampler.drawn_once`). Under PopArt the entropy coefficient counts in units of the task's
    values, so a factor on a task's rewards changes nothing.

    Args:
        config: see :class:`SACConfig`.
        learner: the problem, the network factory and the ELBO.

    Raises:
        UserError: the actions are discrete.
    """

    critic: TwinQ
    training_draws = "anew at every update"
    target_name = "target critics"
    replays_draws = False

    def __init__(self, config: SACConfig, context: AgentContext) -> None:
        spec = context.spec
        if spec.discrete:
            raise UserError("algorithm=sac needs Box actions, and this suite's are Discrete; use algorithm=ppo")

        def build() -> Networks:
            return build_actor(spec, context.make_network, (-20.0, 2.0), 0.0), context.twin_critic()

        super().__init__(config, context, build)
        self.config = config
        self.target_critic = self.critic.target()
        self.target_critic.train(context.elbo.config.draw.targets is TargetDraw.sample)
        self._target_pairs = self._target_parameters()
        self.absorbing["critic"] = replace(self.absorbing["critic"], target_module=self.target_critic)
        log_alpha = torch.full((spec.num_tasks,), config.initial_entropy_coefficient).log()
        self.log_alpha = nn.Parameter(log_alpha.to(spec.device))
        dimensions = spec.action_mask.to(spec.device).sum(1).float()
        self.target_entropy = config.target_entropy_per_dimension * dimensions  # [T]
        self.entropy_step = LossStep(
            [self.log_alpha], config.entropy_learning_rate, 0.0, divergence_guard=context.divergence_guard
        )
        for method, step in (
            (context.gradient.actor, self.actor_step),
            (context.gradient.critic, self.critic_step),
        ):
            if method == TEMPERATURE:
                step.follow_temperature(self.log_alpha)
        self.replay = ReplayBuffer(
            spec.num_tasks, config.replay_capacity_per_task, spec.obs_size, spec.action_size,
            spec.device,
        )  # fmt: skip
        self.window = TaskSubset(
            spec.num_tasks, config.tasks_per_update or spec.num_tasks,
            [self.actor, self.critic, self.target_critic, self.normalizer, self.reward_scaler], [self.log_alpha],
            [step.optimizer for step in (self.actor_step, self.critic_step, self.entropy_step)],
        )  # fmt: skip
        self.transitions_per_task = 0
        self.updates_due = 0.0

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Uniformly random actions at first, then samples of the policy."""
        if self.transitions_per_task < self.config.start_transitions_per_task:
            shape = (*obs.shape[:2], self.spec.action_size)
            uniform = torch.rand(shape, device=obs.device) * 2.0 - 1.0
            return uniform * self.spec.action_mask.to(obs.device).unsqueeze(1)
        with self.weight_sampler.sample(obs.shape[1]):
            return self.policy(self.normalizer(obs)).sample().action

    @torch.no_grad()
    def observe(self, transition: Transition) -> None:
        """Store the step as it is; normalisation happens when a batch is drawn."""
        self.replay.add(transition)
        self.normalizer.update(transition.obs)
        done = transition.terminated | transition.truncated
        self.reward_scaler.update(transition.reward, done)
        self.weight_sampler.record(done)
        self.transitions_per_task += transition.reward.shape[1]
        if self.transitions_per_task >= self.config.start_transitions_per_task:
            self.updates_due += self.config.updates_per_transition_per_task * transition.reward.shape[1]

    def advance(self, fraction: float) -> None:
        """Take note of the share of total_transitions that is done."""
        super().advance(fraction)
        self.entropy_step.advance(fraction)

    def ready(self) -> bool:
        """An update is due."""
        return self.updates_due >= 1.0

    def update(self) -> Scalars:
        """One step of critics, actor, entropy coefficients and targets, for the tasks whose turn it is."""
        with self.window.turn() as tasks:
            if tasks is not None:
                self.task_ids = tasks
            scalars = self._step(tasks)
        self.task_ids = self.spec.task_ids
        self.weight_sampler.resample()
        self.updates += 1
        self.updates_due -= 1.0
        self.finish_update(self.updates - 1)
        return scalars

    def _step(self, tasks: Tensor | None) -> Scalars:
        batch = self._normalized(self.replay.sample(self.config.batch_per_task, tasks))
        transitions = len(self.replay)
        with drawn_once(self.actor), drawn_once(self.critic):
            critic = self._update_critic(batch, transitions)
            actor_loss, log_prob, actor_norm = self._update_actor(batch, transitions)
        target_entropy = self.target_entropy
        if tasks is not None:
            target_entropy = target_entropy[tasks.to(target_entropy.device)]
        self.entropy_step(-self.log_alpha * (log_prob + target_entropy))
        with torch.no_grad():
            torch._foreach_lerp_(*self._target_pairs, self.config.target_rate)
        self.elbo.step(self.trained_modules(), lambda: self._loss_gap(batch, critic))
        return {
            "loss/critic": critic.losses.mean(),
            "loss/actor": actor_loss,
            "loss/value": critic.value,
            "loss/entropy": -log_prob.mean(),
            "loss/entropy_coefficient": self.log_alpha.detach().exp().mean(),
            "loss/actor_grad_norm": actor_norm,
            "loss/critic_grad_norm": critic.grad_norm,
        }

    @torch.no_grad()
    def _normalized(self, batch: ReplayBatch) -> ReplayBatch:
        return ReplayBatch(
            self.normalizer(batch.obs),
            batch.action,
            self.reward_scaler(batch.reward),
            batch.terminated,
            self.normalizer(batch.next_obs),
        )

    def _update_critic(self, batch: ReplayBatch, transitions: int) -> CriticStep:
        alpha = self.log_alpha.detach().exp().unsqueeze(1)  # [T, 1]
        with torch.no_grad():
            next_action = self.policy(batch.next_obs).sample()
            next_q = self.target_critic(batch.next_obs, next_action.action, self.task_ids).amin(0)
            next_value = next_q - alpha * self.critic.value_std() * next_action.log_prob
            target = td_target(batch.reward, next_value, batch.terminated, self.config.discount)
        self.critic.track(target, self.target_critic)
        losses, q = self.critic.loss(batch.obs, batch.action, self.task_ids, target)
        norm = self.critic_step(losses + self.penalty("critic", transitions))
        return CriticStep(losses.detach(), target, q.mean(), norm)

    @torch.no_grad()
    def _loss_gap(self, batch: ReplayBatch, critic: CriticStep) -> Tensor:
        """Critic loss with theta alone minus the critic loss, ``[T]``."""
        with theta_only(self.critic):
            alone, _ = self.critic.loss(batch.obs, batch.action, self.task_ids, critic.target)
        return alone - critic.losses

    def _update_actor(self, batch: ReplayBatch, transitions: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, the log-probability per task ``[T]`` and the gradient norm."""
        alpha = self.log_alpha.detach().exp().unsqueeze(1)
        sample = self.policy(batch.obs).sample()
        with frozen(self.critic):  # a fixed function here: skip its weight gradients
            q = self.critic(batch.obs, sample.action, self.task_ids).amin(0)
        losses = (alpha * sample.log_prob - q / self.critic.value_std()).mean(-1)
        norm = self.actor_step(losses + self.penalty("actor", transitions))
        return losses.detach().mean(), sample.log_prob.detach().mean(-1), norm

    def _target_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those of the target critics and what they follow; spreads only where targets are drawn."""
        targets, sources = list(self.target_critic.parameters()), list(self.critic.parameters())
        sigmas = [] if self.target_critic.training else rho_parameters(self.critic)
        unused = {id(parameter) for parameter in sigmas}
        kept = [pair for pair in zip(targets, sources, strict=True) if id(pair[1]) not in unused]
        return [target for target, _ in kept], [source for _, source in kept]

    def measure_conflict(self) -> None:
        """Of all tasks in one update; updates of a few leave it unmeasured."""
        if self.window.windows == 1:
            super().measure_conflict()

    def reset_networks(self) -> None:
        """Fresh networks, targets, entropy coefficients and optimiser moments; replay and normalisers stay."""
        super().reset_networks()
        self.target_critic.load_state_dict(self.critic.state_dict())
        with torch.no_grad():
            self.log_alpha.fill_(self.config.initial_entropy_coefficient).log_()
        self.entropy_step.forget()

    def memory_bytes(self) -> dict[str, int]:
        """What every training holds, target critics, replay."""
        return {
            **self.common_bytes(share=self.window.share),
            "targets": 4 * sum(parameter.numel() for parameter in self.target_critic.parameters()),
            "replay": 4 * self.replay.rows.numel(),
        }

    def policy_state(self) -> Tree:
        """What every actor-critic has, and the entropy coefficients that values contain."""
        return {**super().policy_state(), "log_alpha": self.log_alpha.detach()}

    def load_policy_state(self, state: Tree) -> None:
        """Put back what :meth:`policy_state` gave."""
        super().load_policy_state(state)
        if "log_alpha" in state:  # best checkpoints of earlier versions have none
            with torch.no_grad():
                self.log_alpha.copy_(state["log_alpha"])

    def take_over_critic(self, state: Tree) -> None:
        """The target critics begin as the critics do."""
        super().take_over_critic(state)
        self.target_critic.load_state_dict(self.critic.state_dict())

    def state(self) -> Tree:
        """Networks, targets, optimisers, normalisers, replay and counters."""
        return {
            **super().state(),
            "target_critic": self.target_critic.state_dict(),
            "entropy_step": self.entropy_step.state(),
            "replay": self.replay.state(),
            "window": self.window.state(),
            "transitions_per_task": self.transitions_per_task,
            "updates_due": self.updates_due,
        }

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        super().load_state(state)
        self.target_critic.load_state_dict(state["target_critic"])
        self.entropy_step.load_state(state["entropy_step"])
        self.replay.load_state(state["replay"])
        if "window" in state:  # checkpoints of earlier versions have none
            self.window.load_state(state["window"])
        self.transitions_per_task = state["transitions_per_task"]
        self.updates_due = state["updates_due"]
