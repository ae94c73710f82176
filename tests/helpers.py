"""Settings and small steps that several test modules share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from envs.suite import Suite, VectorEngine
from varshare_rl.assemble import build_algorithm, build_suite
from varshare_rl.config import TrainConfig, check_config
from varshare_rl.nn import VarShareLoRA
from varshare_rl.nn.critic import CriticOptions
from varshare_rl.nn.stochastic import WeightNoise, stochastic_layers
from varshare_rl.optim.elbo import ElboOptions
from varshare_rl.types import Transition

#: Overrides that make a run on the toy suite take a fraction of a second.
TINY = (
    "env=pointmass",
    "env.envs_per_task=2",
    "network.hidden=[8]",
    "log.every=160",
    "evaluate.every=0",
    "evaluate.episodes=2",
    "checkpoint.every=0",
    "log.quiet=true",
    "device=cpu",
)
#: The same for an algorithm.
TINY_ALGORITHM = {
    "ppo": (
        "algorithm=ppo",
        "algorithm.rollout_transitions_per_task=40",
        "algorithm.epochs=2",
        "algorithm.minibatches=2",
    ),
    "sac": (
        "algorithm=sac",
        "algorithm.start_transitions_per_task=20",
        "algorithm.batch_per_task=8",
        "algorithm.replay_capacity_per_task=100",
        "algorithm.updates_per_transition_per_task=0.25",
    ),
}


def hold_noise(module: nn.Module) -> None:
    """Draw the noise of every stochastic layer once, one draw per task, and use it from now on."""
    for _, layer in stochastic_layers(module):
        layer.noise = WeightNoise(layer.draw_noise(len(layer.log_prior_scale)))


def build(
    env: Any, algorithm: Any, network: Any = None, seed: int = 0, critic: CriticOptions | None = None, **elbo: Any
) -> tuple[Suite, VectorEngine, Any]:
    """A suite, a training engine of it and a fresh algorithm, from the components' options."""
    torch.manual_seed(seed)
    network = network or VarShareLoRA(hidden=[16])
    config = TrainConfig(env, algorithm, network, ElboOptions(**elbo), critic or CriticOptions())
    check_config(config)
    suite = build_suite(config)
    learner = build_algorithm(config, suite, torch.device("cpu"))
    return suite, suite.make_engine(env.envs_per_task, seed), learner


def collect(engine: VectorEngine, learner: Any, obs: Tensor, vector_steps: int) -> Tensor:
    """Act, step and observe; returns the current observations."""
    for _ in range(vector_steps):
        action = learner.act(obs)
        step = engine.step(action.numpy())
        ends = (torch.from_numpy(step.terminated), torch.from_numpy(step.truncated))
        successor = torch.from_numpy(step.next_obs)
        learner.observe(Transition(obs, action, torch.from_numpy(step.reward), *ends, successor))
        obs = torch.from_numpy(step.obs)
    return obs
