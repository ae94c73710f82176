"""Methods with adapters within PPO: a policy that acts under draws learns under them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from adapter_toys import CASES, IN, OUT, SPEC, trained_agent
from torch import Tensor, nn

from varshare_rl.algorithms import ppo
from varshare_rl.algorithms.base import AgentContext, TaskSpec
from varshare_rl.algorithms.ppo import PPO, PPOConfig
from varshare_rl.nn.mlp import TaskMLP
from varshare_rl.nn.varshare_lora import VarShareLoRALayer
from varshare_rl.nn.weight_sampler import Resample
from varshare_rl.optim.elbo import DrawConfig, Elbo, ElboConfig
from varshare_rl.transfer.pretrained import pretrained_from
from varshare_rl.types import Transition


@dataclass
class Watched:
    ratios: list[Tensor]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen = Watched([])
    plain = ppo.ppo_policy_loss

    def loss(log_prob: Tensor, old_log_prob: Tensor, *rest: Any) -> Any:
        seen.ratios.append((log_prob - old_log_prob).detach().exp())
        return plain(log_prob, old_log_prob, *rest)

    monkeypatch.setattr(ppo, "ppo_policy_loss", loss)
    return seen


@pytest.mark.parametrize("name", ["varshare", "share_variational", "share", "lora"])
@pytest.mark.parametrize("acting", list(Resample))
def test_ppo_learns_with_a_ratio_of_one_before_its_first_step(
    name: str, acting: Resample, watched: Watched
) -> None:
    method = CASES[name](SPEC, pretrained_from(trained_agent(3), 3))
    mask = torch.ones(1, OUT // 2, dtype=torch.bool)
    problem = TaskSpec(1, 4, IN, OUT // 2, False, mask, torch.device("cpu"), horizon=40)
    network = method.begin(3)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "rhos" in key:
                parameter.fill_(-1.0)  # noise that matters
            if "mus_B" in key or "eps_B" in key:
                parameter.normal_(std=0.3)
    elbo = Elbo(ElboConfig(draw=DrawConfig(acting=acting)), 1)
    made: list[Callable[[], nn.Module]] = [lambda: network]
    learner = PPO(
        PPOConfig(rollout_transitions_per_task=40, epochs=2, minibatches=1, target_kl=None),
        AgentContext(problem, lambda *sizes: made.pop()(), elbo, make_critic_network=_critic),
    )
    acts_with_draws = name in ("varshare", "share_variational")
    assert ("none" in learner.weight_draws()) != acts_with_draws
    for _ in range(2):
        while not learner.ready():
            obs = torch.randn(1, 4, IN)
            action = learner.act(obs)
            done = torch.rand(1, 4) < 0.2
            never = torch.zeros_like(done)
            learner.observe(Transition(obs, action, torch.randn(1, 4), done, never, torch.randn(1, 4, IN)))
        watched.ratios.clear()
        learner.update()
        first, second = watched.ratios
        assert float((first - 1).abs().max()) < 2e-5
        assert float((second - 1).abs().max()) > 1e-4
    if acts_with_draws and acting is not Resample.mean:
        assert learner.weight_sampler.layers
    assert not any(getattr(layer, "noise", None) for layer in network.modules())
    method.end(network, torch.randn(1, 5, IN))
    method.policy(3)


def _critic(in_features: int, out_features: int) -> nn.Module:
    return TaskMLP([in_features, 8, out_features], lambda a, b: VarShareLoRALayer(a, b, 1, 2), "tanh")
