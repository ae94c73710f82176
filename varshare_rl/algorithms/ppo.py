"""Proximal policy optimisation (Schulman et al. 2017), everything per task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from varshare_rl.algorithms.actor_critic import ActorCritic, Networks
from varshare_rl.algorithms.base import AgentContext, build_actor
from varshare_rl.data.buffers import Rollout, RolloutStep
from varshare_rl.data.normalizers import RewardScale
from varshare_rl.nn.actor import Sample
from varshare_rl.nn.critic import ValueNetwork
from varshare_rl.nn.stochastic import posterior_mean, theta_only
from varshare_rl.ops.rl import finite_mean, gae, normalize_per_task, ppo_policy_loss
from varshare_rl.optim.elbo import TargetDraw
from varshare_rl.types import Scalars, Transition


@dataclass
class PPOConfig:
    """Options of ``algorithm=ppo``. Sizes are per task."""

    name: str = "ppo"
    rollout_transitions_per_task: int = 2000
    epochs: int = 10
    minibatches: int = 8
    learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy_weight: float = 0.005
    target_kl: float | None = 0.05  # stop the rollout's updates when the mean policy KL passes it
    max_grad_norm: float = 0.5
    initial_log_std: float = 0.0
    min_log_std: float = -5.0
    max_log_std: float = 1.0
    normalize_observations: bool = True
    reward_scale: RewardScale = RewardScale.return_std
    resets: int = 0  # times that networks start anew, spread evenly over the budget


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
    state_fields = ("rollout",)

    def __init__(self, config: PPOConfig, context: AgentContext) -> None:
        spec = context.spec
        log_std_range = (config.min_log_std, config.max_log_std)

        def build() -> Networks:
            actor = build_actor(spec, context.make_network, log_std_range, config.initial_log_std)
            return actor, context.value_network()

        super().__init__(config, context, build, epsilon=1e-5)
        self.config = config
        self.rollout = Rollout(-(-config.rollout_transitions_per_task // spec.envs_per_task), spec.device)
        self._acted: list[tuple[Tensor, Sample]] = []

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Sample actions under the draws of ``elbo.draw.acting``."""
        obs = self.normalizer(obs)
        with self.weight_sampler.sample(obs.shape[1]):
            sample = self.policy(obs).sample()
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

    def ready(self) -> bool:
        return self.rollout.full

    def update(self) -> Scalars:
        """Go through all epochs on the rollout or until the policy has moved far enough; then draw weights anew."""
        config, updates_before = self.config, self.updates
        data, explained_variance = self._training_data()
        transitions = data["obs"].shape[1]  # n_i of the ELBO
        done: list[dict[str, Tensor]] = []
        for batch in minibatches(data, config.epochs, config.minibatches):  # sample
            with self.weight_sampler.replay(batch.get("draws")):
                distribution = self.policy(batch["obs"])
            log_prob, entropy = distribution.log_prob(batch["raw_action"]), distribution.entropy().mean(-1)
            policy = ppo_policy_loss(log_prob, batch["log_prob"], batch["advantage"], config.clip)
            actor_losses = policy.loss - config.entropy_weight * entropy
            self.actor_step.aggregate(actor_losses + self.penalty("actor", transitions))
            actor_norm = self.actor_step.clip()
            self.actor_step.step(actor_norm)

            self.critic.track(batch["target"])
            critic_losses = self.critic.loss(batch["obs"], self.task_ids, batch["target"])
            self.critic_step.aggregate(critic_losses + self.penalty("critic", transitions))
            critic_norm = self.critic_step.clip()
            self.critic_step.step(critic_norm)

            self.elbo.step(self.trained_modules(), partial(self._loss_gap, batch, critic_losses))
            self.updates += 1
            done.append({
                "policy": policy.loss.detach().mean(),
                "value": critic_losses.detach().mean(),
                "entropy": entropy.detach().mean(),
                "approximate_kl": finite_mean(policy.approximate_kl),  # a task that has diverged stops nobody
                "clip_fraction": policy.clip_fraction.mean(),
                "actor_grad_norm": actor_norm,
                "critic_grad_norm": critic_norm,
            })  # fmt: skip
            if config.target_kl is not None and float(done[-1]["approximate_kl"]) > config.target_kl:
                break
        self.rollout.position = 0
        self.finish_update(updates_before)
        self.weight_sampler.resample()
        metrics: Scalars = {f"loss/{name}": torch.stack([step[name] for step in done]).mean() for name in done[0]}
        metrics["loss/explained_variance"] = explained_variance
        metrics["loss/minibatches"] = float(len(done))
        return metrics

    @torch.no_grad()
    def _training_data(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return the rollout as ``[T, S * E, ...]`` with advantages and value targets; the explained variance."""
        rollout = self.rollout.fields
        mean = self.elbo.config.draw.targets is TargetDraw.mean
        with posterior_mean(self.critic) if mean else nullcontext():
            value, next_value = (
                self.critic(rollout[name].flatten(1, 2), self.task_ids).view_as(rollout["reward"])
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
        data["advantage"] = normalize_per_task(advantage).flatten(1, 2)
        data["target"] = target.flatten(1, 2)
        unexplained = advantage.flatten(1).var(1) / target.flatten(1).var(1).clamp_min(1e-8)
        return data, (1.0 - unexplained).mean()

    @torch.no_grad()
    def _loss_gap(self, batch: dict[str, Tensor], losses: Tensor) -> Tensor:
        """Return the critic's losses with theta alone minus its ``losses [T]``."""
        with theta_only(self.critic):
            alone = self.critic.loss(batch["obs"], self.task_ids, batch["target"])
        return alone - losses

    def memory_bytes(self) -> dict[str, int]:
        """Add the rollout: observations, action, two floats, two flags, which draws."""
        spec = self.spec
        row = 4 * (2 * spec.obs_size + 2) + (8 if spec.discrete else 4 * spec.action_size) + 2
        row += self.weight_sampler.bytes_per_step()
        return {
            **self.common_bytes(self.rollout.vector_steps),
            "rollout": spec.num_tasks * self.rollout.vector_steps * spec.envs_per_task * row,
        }


def minibatches(data: dict[str, Tensor], epochs: int, count: int) -> Iterator[dict[str, Tensor]]:
    """Yield shuffled minibatches ``[T, M, ...]`` of ``[T, B, ...]``, ``count`` in every epoch."""
    rows = data["obs"].shape[1]
    size = max(rows // count, 1)
    for _ in range(epochs):
        order = torch.randperm(rows, device=data["obs"].device)
        for start in range(0, rows - size + 1, size):
            chosen = order[start : start + size]
            yield {name: value.index_select(1, chosen) for name, value in data.items()}
