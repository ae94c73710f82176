"""Absorbing in training: when, with which moments, and that no importance ratio spans it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import build, collect
from torch import Tensor

from varshare_rl.algorithms import ppo
from varshare_rl.algorithms.ppo import PPOConfig
from varshare_rl.algorithms.sac import SACConfig
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.nn import VarShareConfig, VarShareLoRAConfig, VarShareLoRALayer
from varshare_rl.nn.layer import TaskLayer, posterior_layers
from varshare_rl.optim.absorption import AbsorbConfig, Absorbing, absorb_all
from varshare_rl.optim.optimizer import OptimizerConfig

PPO = PPOConfig(rollout_transitions_per_task=40, epochs=2, minibatches=2, target_kl=None)
SAC = SACConfig(start_transitions_per_task=8, batch_per_task=8, replay_capacity_per_task=200)
ABSORB = AbsorbConfig(every=4, rate=0.5, max_error=9.0)


def learner(algorithm: Any, network: Any, absorb: AbsorbConfig = ABSORB) -> tuple[Any, Any]:
    """An engine and an algorithm whose residuals have a size and something in common."""
    _, engine, made = build(PointMassConfig(envs_per_task=4), algorithm, network, absorb=absorb)
    with torch.no_grad():
        for module in made.trained_modules().values():
            for _, layer in posterior_layers(module):
                for name in layer.per_task_parameters:
                    if "mus" in name:
                        parameter = layer.get_parameter(name)
                        parameter.copy_(0.2 * torch.randn_like(parameter[:1]) + 0.02 * torch.randn_like(parameter))
    if hasattr(made, "target_critic"):
        made.target_critic.load_state_dict(made.critic.state_dict())
    return engine, made


@pytest.mark.parametrize(("before", "after", "due"), [(0, 3, False), (3, 4, True), (4, 7, False), (2, 9, True)])
def test_it_is_due_when_updates_pass_a_multiple(before: int, after: int, due: bool) -> None:
    assert AbsorbConfig(every=4).due(before, after) is due
    assert AbsorbConfig(every=0).due(before, after) is False


@pytest.mark.parametrize("network", [VarShareLoRAConfig(hidden=[16], rank=2), VarShareConfig(hidden=[16])])
def test_ratio_stays_one_before_the_first_step_of_a_rollout(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    plain: Callable[..., Any] = ppo.ppo_policy_loss

    def watched(log_prob: Tensor, old_log_prob: Tensor, *rest: Any) -> Any:
        seen.append((log_prob - old_log_prob).detach())
        return plain(log_prob, old_log_prob, *rest)

    monkeypatch.setattr(ppo, "ppo_policy_loss", watched)
    engine, made = learner(PPO, network)
    obs = torch.from_numpy(engine.reset())
    for _ in range(3):
        obs = collect(engine, made, obs, made.rollout.vector_steps)
        seen.clear()
        made.update()
        metrics = made.metrics()
        assert seen[0].exp().sub(1).abs().max() < 1e-5
        assert metrics["absorb/layers"] > 0
        assert metrics["absorb/moved"] > 0


@pytest.mark.parametrize("algorithm", [PPO, SAC])
def test_updates_say_what_was_absorbed_and_the_state_keeps_it(algorithm: Any) -> None:
    engine, made = learner(algorithm, VarShareLoRAConfig(hidden=[16], rank=2))
    obs = torch.from_numpy(engine.reset())
    first = {}
    while made.updates < 4:
        obs = collect(engine, made, obs, 1)
        while made.ready():
            made.update()
            first = made.metrics()
            assert ("absorb/error" in first) == (made.updates >= 4)
    assert 0 <= first["absorb/error"] <= 9
    layers = [name for name in first if name.startswith("absorb_error/")]
    assert len(layers) == sum(len(list(posterior_layers(module))) for module in made.trained_modules().values())
    state = made.state()
    _, other = learner(algorithm, VarShareLoRAConfig(hidden=[16], rank=2))
    other.load_state(state)
    assert other.absorbed == pytest.approx({name: first[name] for name in other.absorbed})
    assert set(other.absorbed) == {name for name in first if name.startswith("absorb")}


def test_nothing_is_absorbed_by_default() -> None:
    engine, made = learner(PPO, VarShareLoRAConfig(hidden=[16]), AbsorbConfig())
    collect(engine, made, torch.from_numpy(engine.reset()), made.rollout.vector_steps)
    made.update()
    assert not any(name.startswith("absorb") for name in made.metrics())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_moments_of_factors_start_afresh_and_others_stay(kind: str) -> None:
    network = VarShareLoRAConfig(hidden=[16], rank=2) if kind == "lora" else VarShareConfig(hidden=[16])
    engine, made = learner(PPO, network, AbsorbConfig())
    collect(engine, made, torch.from_numpy(engine.reset()), made.rollout.vector_steps)
    made.update()
    optimizer = made.actor_step.optimizer
    layer = made.actor.network.layers[0]
    before = {id(parameter): optimizer.state[parameter]["exp_avg"].clone() for parameter in layer.parameters()}
    absorb_all({"actor": Absorbing(made.actor, [optimizer])}, ABSORB)
    for name, parameter in layer.named_parameters():
        if kind == "lora" and name in layer.per_task_parameters:
            assert parameter not in optimizer.state
        else:
            assert torch.equal(optimizer.state[parameter]["exp_avg"], before[id(parameter)])
    old = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    loss = torch.stack([layer(torch.ones(1, 4), task).square().mean() for task in range(8)])
    made.actor_step(loss)
    for name, parameter in layer.named_parameters():
        if kind == "lora" and name in layer.per_task_parameters:  # the first step is the learning rate at most
            scale = OptimizerConfig().rho_lr_scale if "rhos" in name else 1.0
            assert (parameter - old[name]).abs().max() <= 1.001 * PPO.learning_rate * scale


def test_target_critics_absorb_with_the_critics() -> None:
    _, made = learner(SAC, VarShareLoRAConfig(hidden=[16], rank=2))

    def weights(layer: TaskLayer) -> Tensor:
        assert isinstance(layer, VarShareLoRALayer)
        return layer.theta + layer.scale * (layer.mus_B @ layer.mus_A)

    before = {name: weights(layer) for name, layer in posterior_layers(made.target_critic)}
    made.updates = 4
    made.finish_update(3)
    changed = 0
    critics = dict(posterior_layers(made.critic))
    for name, layer in posterior_layers(made.target_critic):
        torch.testing.assert_close(layer.mus_A, critics[name].mus_A)  # a target that was equal stays equal
        torch.testing.assert_close(layer.theta, critics[name].theta)
        after = weights(layer)
        assert (after - before[name]).norm() / before[name].norm() < 0.05
        changed += int(made.absorbed[f"absorb_error/critic.{name}"] > 0 or (after != before[name]).any())
    assert changed > 0
    assert not any(parameter.requires_grad for parameter in made.target_critic.parameters())
