"""Learners on made-up transitions of the shape of Meta-World's, without environments."""

from __future__ import annotations

import torch
from torch import Tensor

from varshare_rl.algorithms.base import AgentContext, Algorithm, TaskSpec
from varshare_rl.algorithms.ppo import PPO, PPOConfig
from varshare_rl.algorithms.sac import SAC, SACConfig
from varshare_rl.nn import NetworkConfig
from varshare_rl.optim.elbo import Elbo, ElboConfig
from varshare_rl.optim.gradient import GradientConfig
from varshare_rl.run.process import keep_freed_memory
from varshare_rl.types import Transition

OBS_SIZE, ACTION_SIZE = 39, 4


def learner(architecture: NetworkConfig, num_tasks: int, gradient: GradientConfig | None = None) -> AgentContext:
    """What an algorithm is built from, for one environment per task on the CPU, in a process like training's."""
    keep_freed_memory()
    mask = torch.ones(num_tasks, ACTION_SIZE, dtype=torch.bool)
    spec = TaskSpec(num_tasks, 1, OBS_SIZE, ACTION_SIZE, False, mask, torch.device("cpu"), 500)
    elbo = ElboConfig()
    return AgentContext(
        spec,
        lambda inputs, outputs: architecture.build(inputs, outputs, num_tasks, elbo.posterior()),
        Elbo(elbo, num_tasks),
        gradient=gradient or GradientConfig(),
    )


def transition(obs: Tensor, action: Tensor) -> Transition:
    """A made-up outcome of ``action`` on ``obs [T, E, F]``."""
    never = torch.zeros(obs.shape[:2], dtype=torch.bool)
    return Transition(obs, action, torch.randn(obs.shape[:2]), never, never, torch.randn_like(obs))


def step(algorithm: Algorithm, num_tasks: int, envs_per_task: int = 1, obs_size: int = OBS_SIZE) -> None:
    """Act and observe once."""
    obs = torch.randn(num_tasks, envs_per_task, obs_size)
    algorithm.observe(transition(obs, algorithm.act(obs)))


def filled_sac(
    architecture: NetworkConfig,
    num_tasks: int,
    batch_per_task: int,
    capacity: int,
    tasks_per_update: int | None = None,
) -> SAC:
    """SAC with a replay memory full of noise, past its random start."""
    options = SACConfig(
        replay_capacity_per_task=capacity,
        batch_per_task=batch_per_task,
        tasks_per_update=tasks_per_update,
        start_transitions_per_task=1,
        normalize_observations=False,
    )
    algorithm = SAC(options, learner(architecture, num_tasks))
    replay = algorithm.replay
    replay.rows.normal_()
    replay.rows[..., OBS_SIZE : OBS_SIZE + ACTION_SIZE].tanh_()
    replay.rows[..., OBS_SIZE + ACTION_SIZE + 1] = 0.0  # nothing terminates
    replay.filled, replay.position = capacity, 0
    return algorithm


def filled_ppo(
    architecture: NetworkConfig,
    num_tasks: int,
    steps: int,
    minibatches: int,
    epochs: int = 1,
    gradient: GradientConfig | None = None,
) -> PPO:
    """PPO with a full rollout."""
    options = PPOConfig(rollout_transitions_per_task=steps, epochs=epochs, minibatches=minibatches, target_kl=None)
    algorithm = PPO(options, learner(architecture, num_tasks, gradient))
    while not algorithm.ready():
        step(algorithm, num_tasks)
    return algorithm
