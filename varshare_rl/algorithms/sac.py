"""Soft actor-critic (Haarnoja et al. 2018), everything per task."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from varshare_rl.algorithms.actor_critic import ActorCritic, Networks
from varshare_rl.algorithms.base import AgentContext, build_actor
from varshare_rl.data.buffers import ReplayBatch, ReplayBuffer
from varshare_rl.data.normalizers import ObservationStatistics, RewardScale
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.actor import GaussianConfig
from varshare_rl.nn.critic import TwinQ
from varshare_rl.nn.parameters import frozen, rho_parameters
from varshare_rl.nn.stochastic import theta_only
from varshare_rl.nn.weight_sampler import drawn_once
from varshare_rl.ops.rl import td_target
from varshare_rl.optim.elbo import TargetDraw
from varshare_rl.optim.step import LossStep
from varshare_rl.optim.task_subset import MOST_AT_ONCE, TaskSubset, compared
from varshare_rl.registry import register
from varshare_rl.types import Scalars, Transition, Tree


@register("algorithm", "sac")
@dataclass
class SACConfig:
    """``algorithm=sac``: soft actor-critic (Haarnoja et al. 2018). Sizes are per task."""

    name: str = "sac"
    replay_capacity_per_task: int = bounded(100_000, least=1)
    "Transitions of every task that the replay holds."
    replay_folder: str | None = None
    """A folder for a file that the replay is mapped to, where it is too large for memory; it is gone with the
    process."""
    batch_per_task: int = bounded(128, least=1)
    "Transitions of every task in an update."
    tasks_per_update: int | None = bounded(None, least=1)
    """Tasks that an update is of, in turn. Null: all, but 50 at most where what tasks have of their own is most of
    what is trained, and no option compares all tasks at every update."""
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
    noise_correlation: float = bounded(0.0, least=0, below=1)
    "Correlation of the policy's noise from one step of an episode to the next; 0: white noise."
    max_grad_norm: float = bounded(1.0, least=0)
    "Bound on the norm of the gradient, see `optimizer.own_gradients`; 0: none."
    normalize_observations: bool = False
    "Normalise observations, by `observation_statistics`."
    observation_statistics: ObservationStatistics = ObservationStatistics.running
    "Statistics that observations are normalised by: each task's own so far, or fixed scales of the suite."
    min_observation_std: float = bounded(1e-4, above=0)
    "Least standard deviation that observations are divided by, in their own units; what hardly moves stays small."
    reward_scale: RewardScale = RewardScale.none
    """Divisor of rewards: none; the deviation of the task's return (`return_std`); or the task's mean reward over
    the largest one of a task (`ars`)."""
    resets: int = bounded(0, least=0)
    "Times that networks start anew, spread evenly over the budget; the replay stays."

    def check(self, prefix: str) -> None:
        """Raise UserError for a replay folder that is not there."""
        if self.replay_folder is not None and not os.path.isdir(self.replay_folder):
            raise UserError(
                f"{prefix}replay_folder is {self.replay_folder}, which is no folder; give one that is there"
            )

    def build(self, context: AgentContext) -> SAC:
        """Make the algorithm. Raises UserError if the actions are discrete."""
        return SAC(self, context)


class SAC(ActorCritic):
    """SAC with twin critics and an entropy coefficient per task.

    Every update draws weights anew, once for all its passes where the estimator allows
    (:func:`~varshare_rl.nn.weight_sampler.drawn_once`). Under PopArt the entropy coefficient counts in units of the
    task's values, so a factor on a task's rewards changes nothing.

    Args:
        config: see :class:`SACConfig`.
        context: the tasks, the network factory and the ELBO.

    Raises:
        UserError: the actions are discrete.
    """

    critic: TwinQ
    training_draws = "anew at every update"
    target_name = "target critics"
    replays_draws = False
    policy_fields = ("log_alpha?",)  # values contain it; best checkpoints of earlier versions have none
    state_fields = (
        "log_alpha?", "target_critic", "entropy_step", "replay", "window=task_subset?",
        "updates_due",
    )  # fmt: skip

    def __init__(self, config: SACConfig, context: AgentContext) -> None:
        spec = context.spec
        if spec.discrete:
            raise UserError("algorithm=sac needs Box actions, and this suite's are Discrete; use algorithm=ppo")

        def build() -> Networks:
            return build_actor(spec, context.make_network, GaussianConfig()), context.twin_critic()

        log_alpha = torch.full((spec.num_tasks,), config.initial_entropy_coefficient).log()
        self.log_alpha = nn.Parameter(log_alpha.to(spec.device))
        super().__init__(config, context, build, log_temperature=self.log_alpha)
        self.config = config
        self.target_critic = self.critic.target()
        self.target_critic.train(context.elbo.config.draw.targets is TargetDraw.sample)
        self._target_pairs = self._target_parameters()
        self.absorbing["critic"] = replace(self.absorbing["critic"], target_module=self.target_critic)
        dimensions = spec.action_mask.to(spec.device).sum(1).float()
        self.target_entropy = config.target_entropy_per_dimension * dimensions  # [T]
        self.entropy_step = LossStep(
            [self.log_alpha], config.entropy_learning_rate, 0.0, divergence_guard=context.divergence_guard
        )
        self.replay = ReplayBuffer(
            spec.num_tasks, config.replay_capacity_per_task, spec.obs_size, spec.action_size,
            spec.device, config.replay_folder, context.ranks,
        )  # fmt: skip
        context.ranks.require_even(config.batch_per_task, "algorithm.batch_per_task")
        self.task_subset = TaskSubset(
            spec.num_tasks, config.tasks_per_update or self._tasks_at_once(context),
            [self.actor, self.critic, self.target_critic, self.normalizer, self.reward_scaler], [self.log_alpha],
            [
                optimizer
                for step in self.steps()
                for optimizer in step.optimizers
            ],
        )  # fmt: skip
        self.updates_due = 0.0

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Uniformly random actions at first, then samples of the policy."""
        if self.transitions_per_task < self.config.start_transitions_per_task:
            shape = (*obs.shape[:2], self.spec.action_size)
            uniform = torch.rand(shape, device=obs.device) * 2.0 - 1.0
            return uniform * self.spec.action_mask.to(obs.device).unsqueeze(1)
        with self.weight_sampler.sample(obs.shape[1]):
            distribution = self.policy(self.normalizer(obs))
            return distribution.sample(self.action_noise.draw(obs.shape[1])).action

    @torch.no_grad()
    def observe(self, transition: Transition) -> None:
        """Store the step as it is; normalisation happens when a batch is drawn."""
        self.replay.add(transition)
        self.normalizer.update(transition.obs)
        done = transition.terminated | transition.truncated
        self.reward_scaler.update(transition.reward, done, self.updates > 0)
        self.weight_sampler.record(done)
        self.action_noise.record(done)
        self.transitions_per_task += transition.reward.shape[1]
        if self.transitions_per_task >= self.config.start_transitions_per_task:
            self.updates_due += self.config.updates_per_transition_per_task * transition.reward.shape[1]

    def steps(self) -> list[LossStep]:
        return [*super().steps(), self.entropy_step]

    def advance(self, fraction: float) -> None:
        super().advance(fraction)
        self.entropy_step.advance(fraction)

    def ready(self) -> bool:
        return self.updates_due >= 1.0

    def update(self) -> Scalars:
        """Make one step of critics, actor, entropy coefficients and targets, for the tasks whose turn it is."""
        held = len(self.replay)  # transitions of a task
        with self.ranks.dividing(), self.task_subset.turn() as subset:
            self.task_ids = self.spec.task_ids if subset is None else subset
            batch = self._prepared(self.replay.sample(self.config.batch_per_task, subset))
            with drawn_once(self.actor), drawn_once(self.critic):
                target = self._target(batch)
                if self.critic.statistics is not None:
                    self.critic.track(self.ranks.all_rows(target), self.target_critic)
                critic_losses, q = self.critic.loss(batch.obs, batch.action, self.task_ids, target)
                critic_losses, value = self.ranks.mean(critic_losses, q.mean())
                self.critic_step.aggregate(
                    critic_losses + self.penalty("critic", held, self.critic.nat(critic_losses))
                )
                critic_norm = self.critic_step.clip()
                self.critic_step.step(critic_norm)

                actor_losses, log_prob = self.ranks.mean(*self._actor_losses(batch))
                self.actor_step.aggregate(actor_losses + self.penalty("actor", held, self.log_alpha.detach().exp()))
                actor_norm = self.actor_step.clip()
                self.actor_step.step(actor_norm)
            target_entropy = self.target_entropy
            if subset is not None:
                target_entropy = target_entropy[subset.to(target_entropy.device)]
            self.entropy_step(-self.log_alpha * (log_prob + target_entropy))
            with torch.no_grad():
                torch._foreach_lerp_(*self._target_pairs, self.config.target_rate)
            self.elbo.step(self.trained_modules(), partial(self._loss_gap, batch, target, critic_losses))
            scalars: Scalars = {
                "loss/critic": critic_losses.detach().mean(),
                "loss/actor": actor_losses.detach().mean(),
                "loss/value": value,
                "loss/entropy": -log_prob.mean(),
                "loss/actor_grad_norm": actor_norm,
                "loss/critic_grad_norm": critic_norm,
            }
        self.task_ids = self.spec.task_ids
        coefficients = self.log_alpha.detach().exp()  # of all tasks, whosever turn it was
        scalars |= {"entropy_coefficient": coefficients, "loss/entropy_coefficient": coefficients.mean()}
        self.weight_sampler.resample()
        self.updates += 1
        self.updates_due -= 1.0
        self.finish_update(self.updates - 1)
        return scalars

    @torch.no_grad()
    def _prepared(self, batch: ReplayBatch) -> ReplayBatch:
        """Return this rank's rows of a batch, normalised."""
        obs, action, reward, terminated, next_obs = map(self.ranks.rows, vars(batch).values())
        return ReplayBatch(
            self.normalizer(obs), action, self.reward_scaler(reward), terminated, self.normalizer(next_obs)
        )

    @torch.no_grad()
    def _target(self, batch: ReplayBatch) -> Tensor:
        """Return the critics' targets ``[T, B]``: reward and the soft value of the successor."""
        alpha = self.log_alpha.exp().unsqueeze(1)  # [T, 1]
        next_action = self.policy(batch.next_obs).sample()
        next_q = self.target_critic(batch.next_obs, next_action.action, self.task_ids).amin(0)
        next_value = next_q - alpha * self.critic.value_std() * next_action.log_prob
        return td_target(batch.reward, next_value, batch.terminated, self.config.discount)

    def _actor_losses(self, batch: ReplayBatch) -> tuple[Tensor, Tensor]:
        """Return the actor's losses, and the log-probability of its actions without a graph, each ``[T]``."""
        alpha = self.log_alpha.detach().exp().unsqueeze(1)
        sample = self.policy(batch.obs).sample()
        with frozen(self.critic):  # a fixed function here: skip its weight gradients
            q = self.critic(batch.obs, sample.action, self.task_ids).amin(0)
        losses = (alpha * sample.log_prob - q / self.critic.value_std()).mean(-1)
        return losses, sample.log_prob.detach().mean(-1)

    @torch.no_grad()
    def _loss_gap(self, batch: ReplayBatch, target: Tensor, losses: Tensor) -> Tensor:
        """Return the critics' losses with theta alone minus their ``losses [T]``."""
        with theta_only(self.critic):
            losses_alone, _ = self.critic.loss(batch.obs, batch.action, self.task_ids, target)
            (alone,) = self.ranks.mean(losses_alone)
        return alone - losses

    def _target_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return parameters of the target critics and those they follow; rhos only where targets are drawn."""
        targets, sources = list(self.target_critic.parameters()), list(self.critic.parameters())
        sigmas = [] if self.target_critic.training else rho_parameters(self.critic)
        unused = {id(parameter) for parameter in sigmas}
        kept = [pair for pair in zip(targets, sources, strict=True) if id(pair[1]) not in unused]
        return [target for target, _ in kept], [source for _, source in kept]

    def _tasks_at_once(self, context: AgentContext) -> int:
        """Return the tasks of an update that is not told how many."""
        roles = [role for step in (self.actor_step, self.critic_step) for role in step.roles]
        own = sum(role.parameter.numel() for role in roles if role.own)
        few = 2 * own > sum(role.parameter.numel() for role in roles)
        if few and not compared(context.gradient, context.elbo.config, context.divergence_guard):
            return min(self.spec.num_tasks, MOST_AT_ONCE)
        return self.spec.num_tasks

    def description(self) -> dict[str, str]:
        if self.task_subset.turns == 1:
            return {}
        return {"updates": f"of {self.task_subset.size} tasks in turn, see algorithm.tasks_per_update"}

    def own_state(self) -> Tree:
        return {"replay": self.replay.state()}

    def measure_conflict(self) -> None:
        """Have the next update measure it if it is of all tasks."""
        if self.task_subset.turns == 1:
            super().measure_conflict()

    def reset_networks(self) -> None:
        """Start networks, targets, entropy coefficients and moments anew; replay and normalisers stay."""
        super().reset_networks()
        self.target_critic.load_state_dict(self.critic.state_dict())
        with torch.no_grad():
            self.log_alpha.fill_(self.config.initial_entropy_coefficient).log_()
        self.entropy_step.forget()

    def rows_per_update(self) -> int:
        return round(self.task_subset.share * self.spec.num_tasks) * self.config.batch_per_task

    def memory_bytes(self) -> dict[str, int]:
        """Add the target critics and the replay."""
        return {
            **self.common_bytes(share=self.task_subset.share),
            "targets": 4 * sum(parameter.numel() for parameter in self.target_critic.parameters()),
            "replay": 0 if self.config.replay_folder is not None else 4 * math.prod(self.replay.shape),
        }

    def take_over_critic(self, state: Tree) -> None:
        """The target critics begin as the critics do."""
        super().take_over_critic(state)
        self.target_critic.load_state_dict(self.critic.state_dict())
