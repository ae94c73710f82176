"""Evaluation episodes step by step, as the trained agent saw them, for checks of its networks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.envs.suite import VectorEngine
from varshare_rl.nn.actor import Sample
from varshare_rl.nn.stochastic import posterior_mean
from varshare_rl.run.process import one_thread


@dataclass(frozen=True)
class EpisodeRecording:
    """Steps of all slots, ``[S, T, E, ...]`` on the CPU; ``counted`` says which belong to the episodes asked for.

    Observations are normalised as the networks take them, rewards as the critic was trained on them.
    ``next_action`` and ``next_log_prob`` are a draw of the policy at the true successor where time ran out, and 0
    elsewhere.
    """

    obs: Tensor
    action: Tensor
    log_prob: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    next_obs: Tensor
    next_action: Tensor
    next_log_prob: Tensor
    counted: Tensor

    def rows(self, name: str) -> Tensor:
        """Return a field as ``[T, S * E, ...]``."""
        value: Tensor = getattr(self, name)
        return value.transpose(0, 1).flatten(1, 2)


@one_thread()
@torch.no_grad()
def record(algorithm: ActorCritic, engine: VectorEngine, episodes: int) -> EpisodeRecording:
    """Run ``episodes`` episodes of every task and keep every step.

    Actions are sampled, since values are those of the policy that samples; weights are the posterior means, as in
    evaluation. Sampling draws from torch's global generator.
    """
    device = algorithm.spec.device
    episode = np.tile(np.arange(engine.envs_per_task), (engine.num_tasks, 1))  # as in evaluate(), [T, E]
    steps: list[tuple[Tensor, ...]] = []
    obs = engine.reset()
    with posterior_mean(algorithm.actor):
        while (episode < episodes).any():
            seen = algorithm.normalizer(torch.from_numpy(obs).to(device))
            sample = algorithm.policy(seen).sample()
            step = engine.step(sample.action.cpu().numpy())
            next_obs = algorithm.normalizer(torch.from_numpy(step.next_obs).to(device))
            after = Sample(*(torch.zeros_like(part) for part in sample))
            if step.truncated.any():
                after = algorithm.policy(next_obs).sample()
            truncated = torch.from_numpy(step.truncated)
            kept = (
                seen,
                sample.action,
                sample.log_prob,
                algorithm.reward_scaler(torch.from_numpy(step.reward).to(device)),
                torch.from_numpy(step.terminated),
                truncated,
                next_obs,
                after.action,
                torch.where(truncated.to(device), after.log_prob, 0.0),
                torch.from_numpy(episode < episodes),
            )
            steps.append(tuple(part.cpu() for part in kept))
            episode[step.terminated | step.truncated] += engine.envs_per_task
            obs = step.obs
    return EpisodeRecording(*(torch.stack(parts) for parts in zip(*steps, strict=True)))
