"""Proximal policy optimisation (Schulman et al. 2017), everything per task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from varshare_rl.algorithms.actor_critic import ActorCritic, Networks
from varshare_rl.algorithms.base import AgentContext, build_actor
from varshare_rl.data.buffers import Rollout, RolloutStep
from varshare_rl.data.normalizers import ObservationStatistics, RewardScale
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.actor import GaussianActor, GaussianConfig, GaussianFamily, LogStd, Sample
from varshare_rl.nn.critic import Held, ValueNetwork
from varshare_rl.nn.stochastic import posterior_mean, theta_only
from varshare_rl.nn.weight_sampler import drawn_once
from varshare_rl.ops.rl import finite_mean, gae, normalize_over_tasks, normalize_per_task, ppo_policy_loss
from varshare_rl.optim.elbo import TargetDraw
from varshare_rl.optim.optimizer import Schedule
from varshare_rl.registry import register
from varshare_rl.types import Scalars, Transition


class AdvantageScale(Enum):
    """What advantages are brought to zero mean and unit variance over, in a rollout."""

    task = "task"  # the task's own
    rollout = "rollout"  # those of all tasks, each in units of its values under PopArt
    none = "none"


#: Least log standard deviation of Box actions until ``min_log_std_after``.
EARLY_MIN_LOG_STD = -5.0
#: Factor by which ``desired_kl`` moves a learning rate, and the least and largest rate that it comes to.
RATE_STEP, RATE_BOUNDS = 1.5, (1e-6, 1e-2)


@register("algorithm", "ppo")
@dataclass
class PPOConfig:
    """``algorithm=ppo``: proximal policy optimisation (Schulman et al. 2017). Sizes are per task."""

    name: str = "ppo"
    rollout_transitions_per_task: int = bounded(2000, least=2)
    "Transitions of every task between updates."
    epochs: int = bounded(10, least=1, most=10**6)
    "Passes over a rollout."
    minibatches: int = bounded(8, least=1, most=10**6)
    "Gradient steps of an epoch, each on its share of the rollout."
    learning_rate: float = bounded(3e-4, least=0)
    "Learning rate of the actor."
    critic_learning_rate: float = bounded(3e-4, least=0)
    "Learning rate of the critic."
    discount: float = bounded(0.99, least=0, most=1)
    "Factor on the value of the next step."
    gae_lambda: float = bounded(0.95, least=0, most=1)
    "Lambda of the generalised advantage estimate."
    clip: float = bounded(0.2, least=0)
    "Bound on how far the policy's ratio moves from 1."
    entropy_weight: float = bounded(0.005, least=0)
    "Weight of the policy's entropy in the objective."
    entropy_schedule: Schedule = Schedule.constant
    "Fall of the entropy's weight in the course of the budget."
    final_entropy: float = bounded(0.0, least=0, most=1)
    "End of `linear` and `cosine`, as a share of the entropy's weight."
    advantage_scale: AdvantageScale = AdvantageScale.task
    """Advantages that get zero mean and unit variance together: a task's own; those of the whole rollout, under
    PopArt in standard deviations of the task's targets, so that explained tasks count for less; or none."""
    value_clip: float | None = bounded(None, above=0)
    """Bound on how far the critic's loss lets values move from those of the rollout, in units of the loss (under
    PopArt standard deviations of the targets). Null: none."""
    target_kl: float | None = bounded(None, least=0)
    """Nats; a rollout's updates stop before the step at which the policy's mean KL has passed it. Null: never, as
    at large learning rates adapters pass it in their first step, and make no other."""
    desired_kl: float | None = bounded(None, above=0)
    """Nats; after a rollout's updates the policy's learning rate is divided by 1.5 where its mean KL in the last
    epoch is above twice this, and multiplied where below half of it. Null: rates are those of `optimizer` alone."""
    max_grad_norm: float = bounded(0.5, least=0)
    "Bound on the norm of the gradient, see `optimizer.own_gradients`; 0: none."
    policy: GaussianFamily = GaussianFamily.tanh_gaussian
    """Gaussian policy of Box actions: squashed by tanh, or clipped by the environment, with the log-probability and
    the entropy of the action before that."""
    log_std: LogStd = LogStd.network
    "Log standard deviation of Box actions: an output of the network, or a parameter of each task and dimension."
    initial_log_std: float = 0.0
    "Log standard deviation that Box actions start with."
    min_log_std: float = -5.0
    "Least log standard deviation of Box actions."
    min_log_std_after: int = bounded(0, least=0)
    """Transitions of each task after which `min_log_std` holds, from the next rollout on; before, the least is -5.
    A policy that may become sure finds tasks earlier, one that may not goes on improving."""
    max_log_std: float = 1.0
    "Largest log standard deviation of Box actions."
    noise_correlation: float = bounded(0.0, least=0, below=1)
    """Correlation of the noise of Box actions from one step of an episode to the next; 0: white noise, whose pushes
    cancel before an object has moved."""
    normalize_observations: bool = True
    "Normalise observations, by `observation_statistics`."
    observation_statistics: ObservationStatistics = ObservationStatistics.running
    "Statistics that observations are normalised by: each task's own so far, or fixed scales of the suite."
    min_observation_std: float = bounded(1e-4, above=0)
    "Least standard deviation that observations are divided by, in their own units; what hardly moves stays small."
    reward_scale: RewardScale | None = None
    """Divisor of rewards: none; the deviation of the task's return (`return_std`); or the task's mean reward over
    the largest one of a task (`ars`). Null: none where the critic has PopArt, which learns in such units, else
    `return_std`."""
    resets: int = bounded(0, least=0)
    "Times that networks start anew, spread evenly over the budget."

    def check(self, prefix: str) -> None:
        """Raise UserError for crossed bounds of the log standard deviation, and for options without effect."""
        if self.desired_kl is not None and not self.learning_rate:
            raise UserError(f"{prefix}desired_kl moves {prefix}learning_rate, which is 0; leave it out")
        if self.final_entropy and self.entropy_schedule is Schedule.constant:
            raise UserError(
                f"{prefix}final_entropy is {self.final_entropy:g} and counts with {prefix}entropy_schedule=linear "
                "or cosine alone, and it is constant; set the one or leave out the other"
            )
        if self.min_log_std_after and self.min_log_std <= EARLY_MIN_LOG_STD:
            raise UserError(
                f"{prefix}min_log_std_after={self.min_log_std_after} raises the bound from {EARLY_MIN_LOG_STD:g} "
                f"to {prefix}min_log_std, and that is {self.min_log_std:g}; give a larger one, or 0"
            )
        if self.min_log_std > self.max_log_std:
            raise UserError(
                f"{prefix}min_log_std is {self.min_log_std}; it must not be above max_log_std, {self.max_log_std}"
            )

    def build(self, context: AgentContext) -> PPO:
        """Make the algorithm."""
        return PPO(self, context)


class PPO(ActorCritic):
    """PPO on ``[T, S, E]`` rollouts.

    The actor's updates replay the draws of weights that it acted with, so the ratio is 1 before the first step.
    The critic draws anew at each pass.

    Args:
        config: see :class:`PPOConfig`.
        context: the tasks, the network factory and the ELBO.
    """

    training_draws = "the actor under the draws it acted with, the critic anew at every pass"
    target_name = "advantages"
    replays_draws = True
    critic: ValueNetwork
    state_fields = ("rollout", "least_log_std?")
    #: Checkpoints of earlier versions have no bound that rises.
    policy_fields = ("least_log_std?",)

    def __init__(self, config: PPOConfig, context: AgentContext) -> None:
        spec = context.spec
        gaussian = GaussianConfig(
            config.policy, config.log_std, config.initial_log_std, config.min_log_std, config.max_log_std
        )

        def build() -> Networks:
            return build_actor(spec, context.make_network, gaussian), context.value_network()

        super().__init__(config, context, build, epsilon=1e-5)
        self.config = config
        self.rollout = Rollout(-(-config.rollout_transitions_per_task // spec.envs_per_task), spec.device)
        self._minibatch = minibatch_size(self.rollout.vector_steps * spec.envs_per_task, config.minibatches)
        context.ranks.require_even(
            self._minibatch, "a minibatch (algorithm.rollout_transitions_per_task / minibatches)"
        )
        self._acted: list[tuple[Tensor, Sample]] = []
        self._bound_spread()

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Sample actions under the draws of ``elbo.draw.acting``."""
        obs = self.normalizer(obs)
        with self.weight_sampler.sample(obs.shape[1]):
            sample = self.policy(obs).sample(self.action_noise.draw(obs.shape[1]))
        self._acted.append((obs, sample))
        return sample.action

    @torch.no_grad()
    def observe(self, transition: Transition) -> None:
        """Store the step; observation statistics move only between rollouts' steps, before the next act."""
        if not self._acted:
            raise RuntimeError("observe() was called without act() before it")
        obs = torch.cat([obs for obs, _ in self._acted], dim=1)
        raw = torch.cat([sample.raw for _, sample in self._acted], dim=1)
        log_prob = torch.cat([sample.log_prob for _, sample in self._acted], dim=1)
        self._acted.clear()
        done = transition.terminated | transition.truncated
        self.action_noise.record(done)
        self.reward_scaler.update(transition.reward, done, self.updates > 0)
        self.rollout.add(
            RolloutStep(
                obs,
                raw,
                log_prob,
                self.reward_scaler(transition.reward),
                transition.terminated,
                transition.truncated,
                self.normalizer(transition.next_obs),
                self.weight_sampler.record(done),
            )
        )
        self.normalizer.update(transition.obs)
        self.transitions_per_task += transition.reward.shape[1]

    def end_episodes(self, ended: Tensor) -> None:
        super().end_episodes(ended)
        self.rollout.truncate(ended)

    def ready(self) -> bool:
        return self.rollout.full

    def update(self) -> Scalars:
        """Go through all epochs on the rollout or until the policy has moved far enough; then draw weights anew.

        That is asked before each step, of the minibatch at hand, and where it is so neither network makes the step
        (as in Stable-Baselines3 and, for the policy, Spinning Up, with 1.5 times the bound).
        """
        config, updates_before = self.config, self.updates
        data, explained_variance = self._training_data()
        held = data["obs"].shape[1]  # transitions of a task in the rollout
        done: list[dict[str, Tensor]] = []
        with self.ranks.dividing():
            for batch in minibatches(data, config.epochs, config.minibatches):  # sample
                own = {name: self.ranks.rows(value) for name, value in batch.items()}
                with self.weight_sampler.replay(own.get("draws")):
                    distribution = self.policy(own["obs"])
                log_prob, entropy = distribution.log_prob(own["raw_action"]), distribution.entropy().mean(-1)
                policy = ppo_policy_loss(log_prob, own["log_prob"], own["advantage"], config.clip)
                policy_losses, entropy, kl, clip_fraction = self.ranks.mean(
                    policy.loss, entropy, policy.approximate_kl, policy.clip_fraction
                )
                policy_kl = finite_mean(kl)  # a task that has diverged stops nobody
                if done and config.target_kl is not None and float(policy_kl) > config.target_kl:
                    break  # the first step is always made: there the ratio is 1
                actor_losses = policy_losses - self.entropy_weight() * entropy
                self.actor_step.aggregate(actor_losses + self.penalty("actor", held))
                actor_norm = self.actor_step.clip()
                self.actor_step.step(actor_norm)

                self.critic.track(batch["target"])
                (critic_losses,) = self.ranks.mean(self._value_losses(own))
                nat = self.critic.nat(critic_losses)
                self.critic_step.aggregate(critic_losses + self.penalty("critic", held, nat))
                critic_norm = self.critic_step.clip()
                self.critic_step.step(critic_norm)

                self.elbo.step(self.trained_modules(), partial(self._loss_gap, own, critic_losses))
                self.updates += 1
                done.append({
                    "policy": policy_losses.detach().mean(),
                    "value": critic_losses.detach().mean(),
                    "entropy": entropy.detach(),
                    "approximate_kl": policy_kl,
                    "task_kl": kl.detach(),
                    "clip_fraction": clip_fraction.mean(),
                    "actor_grad_norm": actor_norm,
                    "critic_grad_norm": critic_norm,
                })  # fmt: skip
        self.rollout.position = 0
        self._adapt_rate([step["approximate_kl"] for step in done[-config.minibatches :]])
        self.finish_update(updates_before)
        self._bound_spread()
        self.weight_sampler.resample()
        entropies, task_kl = (
            torch.stack([step.pop(name) for step in done]).mean(0) for name in ("entropy", "task_kl")
        )
        metrics: Scalars = {f"loss/{name}": torch.stack([step[name] for step in done]).mean() for name in done[0]}
        metrics |= {"entropy": entropies, "approximate_kl": task_kl, "explained_variance": explained_variance}
        metrics |= {"loss/entropy": entropies.mean(), "loss/explained_variance": explained_variance.mean()}
        metrics["loss/minibatches"] = float(len(done))
        return metrics

    @property
    def least_log_std(self) -> float:
        """Least log standard deviation of the policy's Box actions at present."""
        return self.actor.config.least if isinstance(self.actor, GaussianActor) else self.config.min_log_std

    @least_log_std.setter
    def least_log_std(self, least: float) -> None:
        if isinstance(self.actor, GaussianActor):
            self.actor.config = replace(self.actor.config, least=least)

    def _bound_spread(self) -> None:
        """Bound the policy's spread by ``min_log_std_after``, between two rollouts, so that no ratio spans it."""
        holds = self.transitions_per_task >= self.config.min_log_std_after
        self.least_log_std = self.config.min_log_std if holds else EARLY_MIN_LOG_STD

    def _adapt_rate(self, kls: list[Tensor]) -> None:
        """Bring the policy's KL of an update towards ``desired_kl`` by its learning rate (Rudin et al. 2022)."""
        desired, step = self.config.desired_kl, self.actor_step
        if desired is None:
            return
        kl = float(torch.stack(kls).mean())
        factor = 1 / RATE_STEP if kl > 2.0 * desired else RATE_STEP if kl < 0.5 * desired else 1.0
        least, most = (bound / self.config.learning_rate for bound in RATE_BOUNDS)
        step.rate_factor = min(max(step.rate_factor * factor, least), most)

    def branch(self, fraction: float) -> None:
        """See ``ActorCritic.branch``; a rate that follows ``desired_kl`` stays, a rollout ends with its bound."""
        factor = self.actor_step.rate_factor
        super().branch(fraction)
        if self.config.desired_kl is not None:
            self.actor_step.rate_factor = factor
        if not self.rollout.position:
            self._bound_spread()

    def entropy_weight(self) -> float:
        """Return the weight of the entropy for the share of the budget that is done."""
        config = self.config
        return config.entropy_weight * config.entropy_schedule.factor(min(self.fraction, 1.0), config.final_entropy)

    def _value_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the critic's losses ``[T]``."""
        clip = self.config.value_clip
        held = None if clip is None else Held(batch["value"], clip)
        return self.critic.loss(batch["obs"], self.task_ids, batch["target"], held)

    @torch.no_grad()
    def _training_data(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return the rollout as ``[T, S * E, ...]`` with advantages and targets; the explained variance ``[T]``."""
        rollout = self.rollout.fields
        mean = self.elbo.config.draw.targets is TargetDraw.mean
        with posterior_mean(self.critic) if mean else drawn_once(self.critic):  # one draw for both passes
            value, next_value = (
                self.ranks.by_rows(
                    lambda obs: self.critic(obs, self.task_ids), rollout[name].flatten(1, 2)
                ).view_as(rollout["reward"])
                for name in ("obs", "next_obs")
            )
        advantage = gae(
            rollout["reward"], value, next_value, rollout["terminated"], rollout["truncated"],
            self.config.discount, self.config.gae_lambda,
        )  # fmt: skip
        target = advantage + value
        data = {name: rollout[name].flatten(1, 2) for name in ("obs", "raw_action", "log_prob")}
        if "draws" in rollout:
            data["draws"] = rollout["draws"].flatten(1, 2)
        if self.config.advantage_scale is AdvantageScale.task:
            scaled = normalize_per_task(advantage)
        elif self.config.advantage_scale is AdvantageScale.rollout:
            scaled = normalize_over_tasks(advantage / self.critic.value_std().unsqueeze(-1))
        else:
            scaled = advantage
        data["advantage"], data["target"] = scaled.flatten(1, 2), target.flatten(1, 2)
        if self.config.value_clip is not None:
            data["value"] = value.flatten(1, 2)
        unexplained = advantage.flatten(1).var(1) / target.flatten(1).var(1).clamp_min(1e-8)
        return data, 1.0 - unexplained

    @torch.no_grad()
    def _loss_gap(self, batch: dict[str, Tensor], losses: Tensor) -> Tensor:
        """Return the critic's losses with theta alone minus its ``losses [T]``."""
        with theta_only(self.critic):
            (alone,) = self.ranks.mean(self._value_losses(batch))
        return alone - losses

    def rows_per_update(self) -> int:
        return self.spec.num_tasks * self._minibatch

    def memory_bytes(self) -> dict[str, int]:
        """Add the rollout: observations, action, two floats, two flags, which draws."""
        spec = self.spec
        row = 4 * (2 * spec.obs_size + 2) + (8 if spec.discrete else 4 * spec.action_size) + 2
        row += self.weight_sampler.bytes_per_step()
        return {
            **self.common_bytes(self.rollout.vector_steps),
            "rollout": spec.num_tasks * self.rollout.vector_steps * spec.envs_per_task * row,
        }


def minibatch_size(rows: int, count: int) -> int:
    """Return the rows of each of ``count`` minibatches; rows that fill none are left out."""
    return max(rows // count, 1)


def minibatches(data: dict[str, Tensor], epochs: int, count: int) -> Iterator[dict[str, Tensor]]:
    """Yield shuffled minibatches ``[T, M, ...]`` of ``[T, B, ...]``, ``count`` in every epoch."""
    rows = data["obs"].shape[1]
    size = minibatch_size(rows, count)
    for _ in range(epochs):
        order = torch.randperm(rows, device=data["obs"].device)
        for start in range(0, rows - size + 1, size):
            chosen = order[start : start + size]
            yield {name: value.index_select(1, chosen) for name, value in data.items()}
