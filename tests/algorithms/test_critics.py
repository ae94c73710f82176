"""Every switch of the critics, of the reward scales and of the resets, in both algorithms."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import build, collect
from torch import Tensor, nn

from varshare_rl.algorithms.ppo import PPO, PPOConfig
from varshare_rl.algorithms.sac import SAC, SACConfig
from varshare_rl.data.normalizers import ReturnStdScaler, RewardScale, RewardScaler
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.envs.suite import VectorEngine
from varshare_rl.errors import UserError
from varshare_rl.nn import Posterior, SharedConfig, SharedLayer, VarShareLoRAConfig
from varshare_rl.nn.config import Blocks
from varshare_rl.nn.critic import CriticConfig, ValueLoss
from varshare_rl.nn.mlp import BroNet, TaskMLP

TASKS, ENVS = 3, 4
ENV = PointMassConfig(
    tasks=["normal_left", "normal_left_2", "normal_left_3"], reward_scales=[1, 100, 10_000], envs_per_task=ENVS
)
OPTIONS: dict[str, Any] = {
    "ppo": PPOConfig(rollout_transitions_per_task=40, epochs=2, minibatches=2, reward_scale=RewardScale.none),
    "sac": SACConfig(replay_capacity_per_task=500, batch_per_task=16, start_transitions_per_task=40),
}
NETWORKS: dict[str, Any] = {
    "shared": lambda: SharedConfig(hidden=[16, 16]),
    "varshare_lora": lambda: VarShareLoRAConfig(hidden=[16, 16]),
}
CRITICS = {
    "wide": CriticConfig(hidden=[32]),
    "layer_norm": CriticConfig(layer_norm=True),
    "bronet": CriticConfig(blocks=Blocks.bronet),
    "popart": CriticConfig(popart=True),
    "categorical": CriticConfig(loss=ValueLoss.categorical, bins=21),
    "all": CriticConfig(hidden=[24, 24], blocks=Blocks.bronet, loss=ValueLoss.categorical, popart=True),
}
Learning = PPO | SAC


def make(
    algorithm: str, network: str = "varshare_lora", critic: CriticConfig | None = None, **options: Any
) -> tuple[VectorEngine, Learning]:
    _, engine, learner = build(
        ENV, replace(OPTIONS[algorithm], **options), NETWORKS[network](), critic=critic or CriticConfig()
    )
    return engine, learner


def learn(engine: VectorEngine, learner: Learning, updates: int, obs: Tensor | None = None) -> Tensor:
    """Collect and update until so many more calls of ``update``; returns the observations to act on."""
    obs = torch.from_numpy(engine.reset()) if obs is None else obs
    while updates > 0:
        obs = collect(engine, learner, obs, 1)
        while learner.ready() and updates > 0:
            losses = learner.update()
            assert all(torch.isfinite(torch.as_tensor(value)).all() for value in losses.values())
            updates -= 1
    return obs


@pytest.fixture(params=list(OPTIONS))
def algorithm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", CRITICS)
def test_every_critic_makes_its_updates_and_goes_on_bit_for_bit(algorithm: str, network: str, name: str) -> None:
    engine, learner = make(algorithm, network, CRITICS[name])
    start = deepcopy(learner.critic.state_dict())
    obs = learn(engine, learner, 2)
    assert any(not torch.equal(start[key], value) for key, value in learner.critic.state_dict().items())
    other_engine, other = make(algorithm, network, CRITICS[name])
    other.load_state(deepcopy(learner.state()))
    other_engine.load_state(engine.state())
    random = torch.get_rng_state()
    learn(engine, learner, 2, obs)
    torch.set_rng_state(random)
    learn(other_engine, other, 2, obs)
    for one, two in ((learner.critic, other.critic), (learner.actor, other.actor)):
        for key, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[key]), key


def test_the_critics_architecture_is_its_own(algorithm: str) -> None:
    options = CriticConfig(hidden=[24, 24], blocks=Blocks.bronet)
    _, learner = make(algorithm, "varshare_lora", options)
    assert isinstance(learner.actor.network, TaskMLP)
    networks = [learner.critic.network] if isinstance(learner, PPO) else list(learner.critic.networks)
    assert all(isinstance(network, BroNet) and network.layers[1].theta.shape == (24, 24) for network in networks)
    _, learner = make(algorithm, "varshare_lora", CriticConfig(layer_norm=True))
    assert not any("norms" in name for name, _ in learner.actor.named_parameters())
    assert any("norms" in name for name, _ in learner.critic.named_parameters())


@dataclass
class OwnStack(SharedConfig):
    """An architecture that puts its layers together in a way of its own."""

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        return SharedLayer(in_features, out_features, num_tasks)


def test_architectures_without_residual_blocks_refuse_them() -> None:
    with pytest.raises(UserError, match="without blocks=bronet; choose blocks=mlp") as error:
        build(ENV, OPTIONS["ppo"], OwnStack(hidden=[16]), critic=CriticConfig(blocks=Blocks.bronet))
    assert "\n" not in str(error.value)
    build(ENV, OPTIONS["ppo"], OwnStack(hidden=[16]))


def test_the_values_that_advantages_and_targets_are_made_of_are_in_units_of_the_return(algorithm: str) -> None:
    engine, learner = make(algorithm, critic=CriticConfig(popart=True, popart_rate=0.2))
    learn(engine, learner, 5)
    value_std = learner.critic.value_std()[:, 0]
    assert (value_std[1:] / value_std[:-1] > 30).all()  # rewards are 1 : 100 : 10 000
    obs, action = torch.zeros(TASKS, 8, 4), torch.zeros(TASKS, 8, 2)
    values = (
        learner.critic(obs, learner.task_ids)
        if isinstance(learner, PPO)
        else learner.critic(obs, action, learner.task_ids).amin(0)
    )
    size = values.detach().abs().mean(1)
    assert size[2] > 1_000 * size[0]


def policy_after(algorithm: str, scale: float, popart: bool) -> Tensor:
    """The policy's parameters after a few updates on rewards times ``scale``."""
    env = replace(ENV, reward_scales=[scale] * TASKS)
    options = replace(OPTIONS[algorithm], learning_rate=1e-3)
    critic = CriticConfig(popart=popart)
    _, engine, learner = build(env, options, NETWORKS["shared"](), critic=critic)
    heads = [learner.critic.network] if algorithm == "ppo" else learner.critic.networks
    with torch.no_grad():
        for network in heads:  # values start at 0 at any scale
            network.layers[-1].theta.zero_()
            network.layers[-1].bias.zero_()
    if algorithm == "sac":
        learner.target_critic.load_state_dict(learner.critic.state_dict())
    learner.critic.track(scale * torch.linspace(-1, 1, 40).expand(TASKS, 40))
    learn(engine, learner, 8)
    return torch.cat([parameter.detach().flatten() for parameter in learner.actor.parameters()])


@pytest.mark.parametrize("popart", [True, False])
def test_a_factor_on_the_rewards_changes_nothing_under_popart(algorithm: str, popart: bool) -> None:
    one, thousand = (policy_after(algorithm, scale, popart) for scale in (1.0, 1000.0))
    difference = (one - thousand).abs().max()
    assert difference < 1e-6 if popart else difference > 1e-5, difference


@pytest.mark.parametrize(("popart", "kind"), [(True, RewardScaler), (False, ReturnStdScaler)])
def test_ppo_scales_rewards_unless_popart_has_the_units(popart: bool, kind: type[RewardScaler]) -> None:
    for given, expected in (
        (None, kind),
        (RewardScale.return_std, ReturnStdScaler),
        (RewardScale.none, RewardScaler),
    ):
        options = replace(OPTIONS["ppo"], reward_scale=given)
        _, _, learner = build(ENV, options, NETWORKS["shared"](), critic=CriticConfig(popart=popart))
        assert type(learner.reward_scaler) is expected


def test_the_entropy_coefficient_counts_in_units_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets have ``- value_std alpha log pi``, and the loss of the policy is ``alpha log pi - Q / value_std``."""
    engine, learner = make("sac", critic=CriticConfig(popart=True))
    assert isinstance(learner, SAC)
    learn(engine, learner, 1)
    value_std = torch.tensor([[2.0], [8.0], [0.5]])
    monkeypatch.setattr(learner.critic, "value_std", lambda: value_std)
    monkeypatch.setattr(learner.critic, "track", lambda *_: None)
    monkeypatch.setattr(learner.target_critic, "forward", lambda obs, action, ids: torch.zeros(2, *obs.shape[:2]))
    with torch.no_grad():
        learner.log_alpha.copy_(torch.tensor([0.5, 1.0, 2.0]).log())
        learner.replay.rows[..., 6] = 0.0  # no reward
    log_probs: list[Tensor] = []
    forward = learner.actor.forward

    class Watched:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def sample(self) -> Any:
            drawn = self.inner.sample()
            log_probs.append(drawn.log_prob.detach())
            return drawn

    monkeypatch.setattr(learner.actor, "forward", lambda obs, ids: Watched(forward(obs, ids)))
    batch = learner._prepared(learner.replay.sample(16))
    target = learner._target(batch)
    units = torch.tensor([[1.0], [8.0], [1.0]])  # value_std times alpha
    torch.testing.assert_close(target, -0.99 * units * log_probs[0] * (1 - batch.terminated))
    monkeypatch.setattr(
        learner.critic, "forward", lambda obs, action, ids: action.sum(-1).expand(2, -1, -1) * value_std
    )
    torch.manual_seed(7)
    losses, _ = learner._actor_losses(batch)
    torch.manual_seed(7)
    sample = forward(batch.obs, learner.task_ids).sample()
    alpha = torch.tensor([[0.5], [1.0], [2.0]])
    torch.testing.assert_close(losses, (alpha * sample.log_prob - sample.action.sum(-1)).mean(-1))


def test_adaptive_scales_reach_what_is_learnt_from(algorithm: str) -> None:
    engine, learner = make(algorithm, reward_scale=RewardScale.ars)
    obs = learn(engine, learner, 1)
    scales = learner.reward_scaler.scales.clone()
    assert scales.tolist() == pytest.approx([10_000, 100, 1], rel=0.5)
    if isinstance(learner, SAC):
        learner.reward_scaler.refresh()
        raw = learner.replay.sample(16)
        reward = learner._prepared(raw).reward
        ratio = reward / raw.reward
        torch.testing.assert_close(ratio, learner.reward_scaler.scales.float().unsqueeze(1).expand(TASKS, 16))
    else:
        collect(engine, learner, obs, 5)
        assert torch.equal(learner.reward_scaler.scales, scales)  # settled by the first update
        size = learner.rollout.fields["reward"][:, :5].abs().mean((1, 2))
        torch.testing.assert_close(size, size[2:].expand(3), rtol=0.5, atol=0.0)


def test_resets_renew_the_networks_and_nothing_else(algorithm: str) -> None:
    engine, learner = make(
        algorithm,
        critic=CriticConfig(popart=True),
        resets=3,
        reward_scale=RewardScale.return_std,
        normalize_observations=True,
    )
    fresh = {name: parameter.clone() for name, parameter in learner.critic.named_parameters()}
    obs = learn(engine, learner, 3)
    learned = [parameter.detach().clone() for parameter in learner.actor.parameters()]
    statistics = deepcopy(learner.critic.statistics.state_dict())  # type: ignore[union-attr]
    kept = deepcopy([learner.normalizer.state_dict(), learner.reward_scaler.state_dict()])
    learner.advance(0.24)
    learner.finish_update(learner.updates)
    assert learner.resets_done == 0
    assert all(torch.equal(a, b) for a, b in zip(learned, learner.actor.parameters(), strict=True))
    learner.advance(0.25)
    learner.finish_update(learner.updates)
    assert learner.resets_done == 1
    assert learner.updates > 0
    assert not any(
        torch.equal(a, b) for a, b in zip(learned, learner.actor.parameters(), strict=True) if a.std() > 0
    )
    for name, parameter in learner.critic.named_parameters():
        if "mus_B" in name or "rhos" in name or "affine" in name:  # these start the same every time
            assert torch.equal(parameter, fresh[name]), name
        else:
            assert not torch.equal(parameter, fresh[name]), name  # a start of its own
    for step in (learner.actor_step, learner.critic_step):
        assert len(step.optimizer.state) == 0
    for now, then in zip(
        (learner.critic.statistics, learner.normalizer, learner.reward_scaler), (statistics, *kept), strict=True
    ):
        for name, value in now.state_dict().items():  # type: ignore[union-attr]
            assert torch.equal(value, then[name]), name
    if isinstance(learner, SAC):
        assert len(learner.replay) > 0
        assert learner.log_alpha.tolist() == [0.0] * TASKS
        for one, other in zip(learner.critic.parameters(), learner.target_critic.parameters(), strict=True):
            assert torch.equal(one, other)
        assert learner.target_critic.statistics is learner.critic.statistics
    learn(engine, learner, 2, obs)  # and they learn on
    assert all(len(step.optimizer.state) > 0 for step in (learner.actor_step, learner.critic_step))


def test_resets_are_spread_evenly_and_each_happens_once(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, learner = make(algorithm, resets=4)
    happened: list[int] = []
    monkeypatch.setattr(learner, "reset_networks", lambda: happened.append(percent))
    for percent in range(101):
        learner.advance(percent / 100)
        learner.finish_update(learner.updates)
    assert happened == [20, 40, 60, 80]
    _, without = make(algorithm)
    monkeypatch.setattr(without, "reset_networks", lambda: happened.append(-1))
    without.advance(1.0)
    without.finish_update(without.updates)
    assert happened == [20, 40, 60, 80]


def test_resets_are_deterministic(algorithm: str) -> None:
    states = []
    for _ in range(2):
        engine, learner = make(algorithm, resets=1)
        obs = learn(engine, learner, 1)
        learner.advance(0.5)
        learn(engine, learner, 3, obs)
        assert learner.resets_done == 1
        states.append(learner.actor.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
