from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import build, collect, hold_noise
from torch import Tensor
from torch.distributions import Normal

from varshare_rl.algorithms import ppo
from varshare_rl.algorithms.ppo import PPO, AdvantageScale, PPOConfig
from varshare_rl.data.normalizers import RewardScale
from varshare_rl.envs.cartpole import CartPoleConfig
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.envs.suite import VectorEngine
from varshare_rl.nn import IndependentConfig, SharedConfig, VarShareConfig, VarShareLoRAConfig
from varshare_rl.nn.actor import GaussianFamily, LogStd
from varshare_rl.nn.critic import CriticConfig, ValueNetwork
from varshare_rl.nn.parameters import total_kl
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.nn.weight_sampler import Resample
from varshare_rl.ops.rl import clipped_squared_error, gae, normalize_per_task, squared_error
from varshare_rl.optim.elbo import DrawConfig, TargetDraw
from varshare_rl.optim.gradient import GradientConfig
from varshare_rl.optim.optimizer import Schedule
from varshare_rl.types import Transition

ENVS = 4
OPTIONS = PPOConfig(rollout_transitions_per_task=80, epochs=3, minibatches=4, target_kl=None)
SUITES: dict[str, Callable[[], Any]] = {
    "box": lambda: PointMassConfig(envs_per_task=ENVS),
    "discrete": lambda: CartPoleConfig(envs_per_task=ENVS),
}
NETWORKS: dict[str, Callable[[], Any]] = {
    "varshare_lora": lambda: VarShareLoRAConfig(hidden=[16]),
    "varshare": lambda: VarShareConfig(hidden=[16]),
    "shared": lambda: SharedConfig(hidden=[16]),
    "independent": lambda: IndependentConfig(hidden=[16]),
}
STOCHASTIC = ("varshare_lora", "varshare")


def make(
    suite: str,
    network: str = "varshare_lora",
    spread: float = -2.0,
    acting: Resample = Resample.per_update,
    **options: Any,
) -> tuple[VectorEngine, PPO]:
    """An engine and a PPO whose posteriors are wide enough for their noise to matter."""
    elbo = {"draw": DrawConfig(acting=acting)}
    _, engine, learner = build(SUITES[suite](), replace(OPTIONS, **options), NETWORKS[network](), **elbo)
    assert isinstance(learner, PPO)
    with torch.no_grad():
        for name, parameter in learner.actor.named_parameters():
            if ".rhos" in name:
                parameter.fill_(spread)
    return engine, learner


def rollout(engine: VectorEngine, learner: PPO) -> None:
    collect(engine, learner, torch.from_numpy(engine.reset()), learner.rollout.vector_steps)
    assert learner.ready()


@pytest.fixture
def log_ratios(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logarithms of the importance ratios of every minibatch from here on."""
    seen: list[Tensor] = []
    plain = ppo.ppo_policy_loss

    def watched(log_prob: Tensor, old_log_prob: Tensor, *rest: Any) -> Any:
        seen.append((log_prob - old_log_prob).detach())
        return plain(log_prob, old_log_prob, *rest)

    monkeypatch.setattr(ppo, "ppo_policy_loss", watched)
    return seen


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("acting", list(Resample))
def test_ratio_is_one_before_the_first_step(
    suite: str, network: str, acting: Resample, log_ratios: list[Tensor]
) -> None:
    """With sampled weights, running observation statistics and a rollout that crosses episodes."""
    engine, learner = make(suite, network, acting=acting, minibatches=1, epochs=2)
    for _ in range(2):
        rollout(engine, learner)
        log_ratios.clear()
        learner.update()
        first, second = log_ratios
        assert first.shape == (engine.num_tasks, 80)
        assert (first.exp() - 1).abs().max() <= 1e-5
        assert (second.exp() - 1).abs().max() > 1e-4  # and not after it


@pytest.mark.parametrize("log_std", list(LogStd))
def test_a_clipped_policy_learns_from_the_action_before_clipping(log_std: LogStd, log_ratios: list[Tensor]) -> None:
    engine, learner = make(
        "box", "shared", minibatches=1, epochs=2, policy=GaussianFamily.clipped_gaussian, log_std=log_std,
        initial_log_std=-0.3, max_log_std=-0.2,
    )  # fmt: skip
    obs = torch.from_numpy(engine.reset())
    outputs = learner.actor.network(learner.normalizer(obs), learner.task_ids)
    mean, own = outputs[..., :2], outputs[..., 2:] if log_std is LogStd.network else torch.zeros(8, ENVS, 2)
    action = learner.act(obs)
    ((_, sample),) = learner._acted
    exact = Normal(mean, (own - 0.3).clamp(max=-0.2).exp()).log_prob(sample.raw).sum(-1)
    torch.testing.assert_close(sample.log_prob, exact)
    assert torch.equal(action, sample.raw.clamp(-1, 1))
    learner._acted.clear()
    rollout(engine, learner)
    assert (learner.rollout.fields["raw_action"].abs() > 1).any()
    learner.update()
    assert (log_ratios[0].exp() - 1).abs().max() <= 1e-5
    assert (log_ratios[1].exp() - 1).abs().max() > 1e-4
    greedy = learner.evaluation_policy(ENVS).act(obs)
    outputs = learner.actor.network(learner.normalizer(obs), learner.task_ids)
    torch.testing.assert_close(greedy, outputs[..., :2].clamp(-1, 1))


@pytest.mark.parametrize("log_std", list(LogStd))
def test_the_spread_is_bounded_late_and_no_ratio_spans_the_change(
    log_std: LogStd, log_ratios: list[Tensor]
) -> None:
    """80 transitions of each task are a rollout; after 100 the second one has ended, and the third is bounded."""
    engine, learner = make(
        "box", "shared", minibatches=1, epochs=1, log_std=log_std, initial_log_std=-3.0, min_log_std=-0.7,
        min_log_std_after=100,
    )  # fmt: skip
    obs = torch.from_numpy(engine.reset())

    def spread() -> float:
        return float(learner.policy(learner.normalizer(obs)).log_std.detach().min())  # type: ignore[attr-defined]

    for least in (-5.0, -5.0, -0.7):
        assert learner.least_log_std == least
        assert (spread() < -2.0) is (least == -5.0)
        rollout(engine, learner)
        log_ratios.clear()
        learner.update()
        assert (log_ratios[0].exp() - 1).abs().max() <= 1e-5
    assert spread() == pytest.approx(-0.7)
    _, again = make(
        "box", "shared", minibatches=1, epochs=1, log_std=log_std, initial_log_std=-3.0, min_log_std=-0.7,
        min_log_std_after=100,
    )  # fmt: skip
    assert again.least_log_std == -5.0
    again.load_policy_state(learner.policy_state())  # as evaluation does
    assert again.least_log_std == -0.7
    again.reset_networks()
    again._bound_spread()
    assert again.least_log_std == -5.0  # no transitions of its own


def test_the_weight_of_the_entropy_falls_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor's losses are those of the policy less the weighted entropy."""
    engine, learner = make(
        "box", "shared", minibatches=1, epochs=1, entropy_weight=0.5, entropy_schedule=Schedule.linear,
        final_entropy=0.2, policy=GaussianFamily.clipped_gaussian,
    )  # fmt: skip
    given: list[Tensor] = []
    monkeypatch.setattr(learner.actor_step, "aggregate", lambda losses: given.append(losses.detach()))
    monkeypatch.setattr(learner.actor_step, "clip", lambda: torch.zeros(()))
    monkeypatch.setattr(learner.actor_step, "step", lambda norm: None)
    for fraction, weight in ((0.0, 0.5), (0.5, 0.3), (1.1, 0.1)):
        rollout(engine, learner)
        learner.advance(fraction)
        assert learner.entropy_weight() == pytest.approx(weight)
        metrics = learner.update()
        expected = metrics["loss/policy"] - weight * metrics["loss/entropy"]
        assert float(given.pop().mean()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("popart", [False, True])
def test_values_are_held_near_those_of_the_rollout(popart: bool) -> None:
    options = replace(OPTIONS, value_clip=0.05, minibatches=1, epochs=1)
    _, engine, learner = build(SUITES["box"](), options, NETWORKS["shared"](), critic=CriticConfig(popart=popart))
    for _ in range(2):
        rollout(engine, learner)
        learner.update()
    rollout(engine, learner)
    data, _ = learner._training_data()
    seen = learner.rollout.fields["obs"].flatten(1, 2)
    torch.testing.assert_close(data["value"], learner.critic(seen, learner.task_ids).detach())
    with torch.no_grad():
        learner.critic.network.layers[-1].bias -= 0.3
    value, old, target = learner.critic(data["obs"], learner.task_ids), data["value"], data["target"]
    if popart:
        value, old, target = (
            learner.critic.statistics.normalize(x, learner.task_ids) for x in (value, old, target)
        )
    assert ((value - old).abs() > 0.05).any()
    expected = clipped_squared_error(value, target, old, 0.05)
    torch.testing.assert_close(learner._value_losses(data), expected)
    assert (expected > squared_error(value, target) + 1e-4).any()


@pytest.mark.parametrize("scale", list(AdvantageScale))
def test_advantages_are_scaled_as_told(scale: AdvantageScale) -> None:
    engine, learner = make("box", "shared", advantage_scale=scale)
    rollout(engine, learner)
    data, _ = learner._training_data()
    advantage = data["target"] - learner.critic(data["obs"], learner.task_ids).detach()
    expected = {
        AdvantageScale.task: normalize_per_task(advantage),
        AdvantageScale.rollout: (advantage - advantage.mean()) / (advantage.std() + 1e-8),
        AdvantageScale.none: advantage,
    }
    torch.testing.assert_close(data["advantage"], expected[scale], rtol=1e-4, atol=1e-5)


def test_advantages_of_a_rollout_are_in_units_of_popart() -> None:
    """A task whose rewards are a thousand times as large counts as any other."""
    suite = PointMassConfig(envs_per_task=ENVS, reward_scales=[1.0, 1000.0] * 4)
    options = replace(OPTIONS, advantage_scale=AdvantageScale.rollout)
    _, engine, learner = build(
        suite, options, NETWORKS["shared"](), critic=CriticConfig(popart=True, popart_rate=1.0)
    )
    for _ in range(2):
        rollout(engine, learner)
        learner.update()
    rollout(engine, learner)
    data, _ = learner._training_data()
    advantage = data["target"] - learner.critic(data["obs"], learner.task_ids).detach()
    scale = learner.critic.statistics.std.float().unsqueeze(1)
    assert scale.max() > 100 * scale.min()
    in_units = advantage / scale
    torch.testing.assert_close(
        data["advantage"], (in_units - in_units.mean()) / in_units.std(), rtol=1e-3, atol=1e-4
    )
    spreads = data["advantage"].std(1)
    assert spreads.max() < 10 * spreads.min()


def test_entropy_and_explained_variance_are_told_of_every_task() -> None:
    engine, learner = make("box", "shared", epochs=1, minibatches=1)
    rollout(engine, learner)
    data, _ = learner._training_data()
    with torch.no_grad():
        entropy = learner.policy(data["obs"]).entropy().mean(-1)
    expected = 1 - (data["target"] - learner.critic(data["obs"], learner.task_ids)).var(1) / data["target"].var(1)
    metrics = learner.update()
    torch.testing.assert_close(metrics["entropy"], entropy, rtol=0, atol=0.5)  # of the squashed action: sampled
    torch.testing.assert_close(metrics["explained_variance"], expected.detach(), rtol=1e-4, atol=1e-5)
    assert metrics["approximate_kl"].tolist() == pytest.approx([0.0] * 8, abs=1e-6)  # before the first step
    for name in ("entropy", "approximate_kl", "explained_variance"):
        torch.testing.assert_close(metrics[f"loss/{name}"], metrics[name].mean())


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("network", STOCHASTIC)
def test_ratio_would_not_be_one_if_weights_were_drawn_anew(
    suite: str, network: str, log_ratios: list[Tensor]
) -> None:
    """Guards the test above."""
    engine, learner = make(suite, network, minibatches=1, epochs=1)
    rollout(engine, learner)
    learner.weight_sampler.resample()
    learner.update()
    assert (log_ratios[0].exp() - 1).abs().max() > 0.01


@pytest.mark.parametrize("network", STOCHASTIC)
def test_noise_is_held_for_a_rollout_and_changes_after_its_updates(network: str) -> None:
    engine, learner = make("box", network)

    def held() -> list[Tensor]:
        return [value.clone() for values in learner.weight_sampler.values.values() for value in values]

    start = held()
    assert start
    rollout(engine, learner)
    assert all(torch.equal(a, b) for a, b in zip(start, held(), strict=True))
    learner.update()
    rollout(engine, learner)
    assert not any(torch.equal(a, b) for a, b in zip(start, held(), strict=True))
    assert {layer.noise for _, layer in stochastic_layers(learner.critic)} == {None}  # draws anew each time


def test_greedy_actions_are_those_of_the_posterior_mean() -> None:
    engine, learner = make("box")
    obs = torch.from_numpy(engine.reset())
    policy = learner.evaluation_policy(obs.shape[1])
    greedy = policy.act(obs)
    assert torch.equal(greedy, policy.act(obs))
    hold_noise(learner.actor)
    assert torch.equal(greedy, policy.act(obs))
    assert learner.actor.training
    layers = [layer for _, layer in stochastic_layers(learner.actor)]
    x = learner.normalizer(obs)
    for index, layer in enumerate(layers):
        weight = layer.theta + layer.scale * layer.mus_B @ layer.mus_A  # type: ignore[attr-defined]
        x = (torch.tanh(x) if index else x) @ weight.transpose(1, 2) + layer.bias  # type: ignore[attr-defined]
    torch.testing.assert_close(greedy, torch.tanh(x[..., :2]))


def feed(learner: PPO, terminated: list[bool], truncated: list[bool]) -> None:
    """One rollout of reward 1; each task ends at every step in its own way."""
    tasks = len(terminated)
    ends = [torch.tensor(flags).unsqueeze(1).expand(tasks, ENVS) for flags in (terminated, truncated)]
    while not learner.ready():
        obs = torch.randn(tasks, ENVS, 4)
        action = learner.act(obs)
        learner.observe(Transition(obs, action, torch.ones(tasks, ENVS), *ends, torch.randn(tasks, ENVS, 4)))


def test_a_time_limit_is_bootstrapped_and_an_end_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[Tensor] = []
    plain = ValueNetwork.loss

    def watched(critic: ValueNetwork, obs: Tensor, ids: Tensor, target: Tensor, *rest: Any) -> Tensor:
        targets.append(target)
        return plain(critic, obs, ids, target, *rest)

    monkeypatch.setattr(ValueNetwork, "loss", watched)
    env = PointMassConfig(tasks=["normal_left", "normal_right"], envs_per_task=ENVS)
    options = replace(
        OPTIONS, reward_scale=RewardScale.none, epochs=1, minibatches=1, discount=0.5, gae_lambda=0.7,
        rollout_transitions_per_task=2 * ENVS,
    )  # fmt: skip
    _, _, learner = build(env, options)
    monkeypatch.setattr(
        learner.critic, "forward", lambda obs, ids: torch.full(obs.shape[:2], 10.0, requires_grad=True)
    )
    feed(learner, terminated=[False, True], truncated=[True, False])
    learner.update()
    torch.testing.assert_close(targets[-1], torch.tensor([[6.0], [1.0]]).expand(2, 2 * ENVS))  # 1 + 0.5 * 10, and 1
    feed(learner, terminated=[False, False], truncated=[False, False])
    learner.update()
    # the last step: 1 + 0.5 * 10; the first one: its error of -4, and 0.35 times that of the last one
    steps = targets[-1].sort(-1).values
    torch.testing.assert_close(steps[:, ENVS:], torch.full((2, ENVS), 6.0))
    torch.testing.assert_close(steps[:, :ENVS], torch.full((2, ENVS), 10.0 - 4.0 - 0.35 * 4.0))


@pytest.mark.parametrize("targets", list(TargetDraw))
def test_values_of_a_rollout_are_of_one_critic(monkeypatch: pytest.MonkeyPatch, targets: TargetDraw) -> None:
    engine, learner = make("box", normalize_observations=False)
    learner.elbo.config.draw.targets = targets
    rollout(engine, learner)
    seen: list[Tensor] = []
    monkeypatch.setattr(ppo, "gae", lambda *given: seen.extend(given) or gae(*given))
    learner._training_data()
    _, value, next_value, terminated, truncated = seen[:5]
    follows = ~(terminated | truncated).bool()[:, :-1]  # the next row is what came next
    assert follows.any()
    torch.testing.assert_close(next_value[:, :-1][follows], value[:, 1:][follows])


@pytest.mark.parametrize(("target_kl", "minibatches"), [(None, 12), (1e9, 12), (0.0, 1)])
def test_updates_stop_at_the_target_kl(target_kl: float | None, minibatches: int) -> None:
    """The first minibatch's policy has not moved yet; a target of 0 is passed at the second."""
    engine, learner = make("box", target_kl=target_kl)
    rollout(engine, learner)
    metrics = learner.update()
    assert metrics["loss/minibatches"] == minibatches
    assert learner.updates == minibatches
    assert not learner.ready()


@pytest.mark.parametrize(("desired", "factor"), [(1e-9, 1 / 1.5), (1e3, 1.5)])
def test_the_rate_follows_the_kl_that_is_desired(desired: float, factor: float) -> None:
    engine, learner = make("box", "shared", desired_kl=desired, learning_rate=1e-3)
    critic = learner.critic_step.optimizer.param_groups[0]["lr"]
    for updates in range(1, 8):
        rollout(engine, learner)
        learner.update()
        learner.advance(0.5)
        expected = min(max(1e-3 * factor**updates, 1e-6), 1e-2)
        assert learner.actor_step.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        assert learner.metrics()["optimizer/actor_rate_factor"] == pytest.approx(expected / 1e-3)
    assert learner.critic_step.optimizer.param_groups[0]["lr"] == critic


def test_the_kl_comes_to_what_is_desired() -> None:
    engine, learner = make("box", "shared", desired_kl=0.003, learning_rate=1e-2)
    kls = []
    for _ in range(14):
        rollout(engine, learner)
        kls.append(float(learner.update()["loss/approximate_kl"]))
        learner.advance(0.0)
    assert kls[0] > 0.03
    assert max(kls[-3:]) < 0.009


def test_the_step_at_which_the_policy_has_moved_too_far_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, learner = make("box", "shared", target_kl=0.01, learning_rate=3e-3)
    rollout(engine, learner)
    networks, plain = (learner.actor, learner.critic), ppo.ppo_policy_loss
    kls: list[float] = []
    weights: list[list[Tensor]] = []

    def watched(*arguments: Any) -> Any:
        loss = plain(*arguments)
        kls.append(loss.approximate_kl.mean().item())
        weights.append([parameter.detach().clone() for network in networks for parameter in network.parameters()])
        return loss

    monkeypatch.setattr(ppo, "ppo_policy_loss", watched)
    metrics = learner.update()
    assert max(kls[:-1]) <= 0.01 < kls[-1]
    assert 2 < metrics["loss/minibatches"] == learner.updates == len(kls) - 1 < 12
    assert metrics["loss/approximate_kl"] == pytest.approx(sum(kls[:-1]) / (len(kls) - 1), rel=1e-5)
    after = [parameter for network in networks for parameter in network.parameters()]
    assert all(torch.equal(now, then) for now, then in zip(after, weights[-1], strict=True))
    assert not any(torch.equal(then, before) for then, before in zip(weights[-1], weights[-2], strict=True))


def test_minibatches_cover_the_rollout_once_an_epoch(log_ratios: list[Tensor]) -> None:
    engine, learner = make("box", epochs=2, minibatches=5)
    rollout(engine, learner)
    learner.update()
    assert [tuple(x.shape) for x in log_ratios] == [(8, 16)] * 10


def test_the_divergence_weighs_on_actor_and_critic() -> None:
    nats = {}
    for weight in (0.0, 1.0):
        _, engine, learner = build(SUITES["box"](), OPTIONS, kl_weight=weight)
        start = [total_kl(module, 8).detach().sum() for module in (learner.actor, learner.critic)]
        for _ in range(3):
            rollout(engine, learner)
            learner.update()
        nats[weight] = [
            float(total_kl(module, 8).detach().sum() / before)
            for module, before in zip((learner.actor, learner.critic), start, strict=True)
        ]
    assert all(heavy < light - 1e-3 for heavy, light in zip(nats[1.0], nats[0.0], strict=True))


def test_acting_in_turns_is_stored_in_order(log_ratios: list[Tensor]) -> None:
    """Half of the environments may be acted for while the other half is stepped."""
    engine, learner = make("box", minibatches=1, epochs=1)
    obs = torch.from_numpy(engine.reset())
    while not learner.ready():
        position = learner.rollout.position
        seen = learner.normalizer(obs)
        action = torch.cat([learner.act(obs[:, :1]), learner.act(obs[:, 1:])], dim=1)
        step = engine.step(action.numpy())
        ends = (torch.from_numpy(step.terminated), torch.from_numpy(step.truncated))
        successor = torch.from_numpy(step.next_obs)
        learner.observe(Transition(obs, action, torch.from_numpy(step.reward), *ends, successor))
        torch.testing.assert_close(learner.rollout.fields["obs"][:, position], seen)
        torch.testing.assert_close(torch.tanh(learner.rollout.fields["raw_action"][:, position]), action)
        obs = torch.from_numpy(step.obs)
    learner.update()
    assert (log_ratios[0].exp() - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_the_noise_of_actions_goes_on_within_episodes(correlation: float) -> None:
    """Measured in what the updates read: the raw actions of a rollout, in deviations of the policy that acted."""
    torch.manual_seed(0)
    engine, learner = make(
        "box", acting=Resample.mean, noise_correlation=correlation, rollout_transitions_per_task=200 * ENVS
    )
    collect(engine, learner, torch.from_numpy(engine.reset()), 200)
    rollout = learner.rollout.fields  # [T, S, E, ...]
    with torch.no_grad():
        policy = learner.policy(rollout["obs"].flatten(1, 2))
    noise = (rollout["raw_action"].flatten(1, 2) - policy.mean) / policy.log_std.exp()  # type: ignore[attr-defined]
    noise = noise.view_as(rollout["raw_action"])
    goes_on = ~(rollout["terminated"] | rollout["truncated"])[:, :-1]
    before, after = noise[:, :-1], noise[:, 1:]
    for chosen, expected in ((goes_on, correlation), (~goes_on, 0.0)):
        pair = torch.stack([before[chosen].flatten(), after[chosen].flatten()])
        assert float(torch.corrcoef(pair)[0, 1]) == pytest.approx(expected, abs=5 / pair.shape[1] ** 0.5)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.05)


def test_observe_needs_an_act() -> None:
    _, learner = make("box")
    obs, no = torch.zeros(8, ENVS, 4), torch.zeros(8, ENVS, dtype=torch.bool)
    transition = Transition(obs, torch.zeros(8, ENVS, 2), torch.zeros(8, ENVS), no, no, obs)
    with pytest.raises(RuntimeError, match="without act"):
        learner.observe(transition)
    learner.act(obs)
    learner.observe(transition)
    with pytest.raises(RuntimeError, match="without act"):
        learner.observe(transition)


def held_draws(learner: PPO) -> int:
    return sum(value.nbytes for values in learner.weight_sampler.values.values() for value in values)


@pytest.mark.parametrize("horizon", [10, 7])  # of 10 vector steps
def test_the_predicted_memory_has_draws_per_episode_and_gradients_per_task(horizon: int) -> None:
    elbo = {"draw": DrawConfig(acting=Resample.per_episode)}
    options = PPOConfig(rollout_transitions_per_task=10 * ENVS, epochs=1, minibatches=1)
    gradient = GradientConfig("pcgrad", "pcgrad")
    env = PointMassConfig(envs_per_task=ENVS, horizon=horizon)
    _, engine, learner = build(env, options, gradient=gradient, **elbo)
    predicted, most = learner.memory_bytes(), 0
    obs = torch.from_numpy(engine.reset())
    for _ in range(4):
        obs = collect(engine, learner, obs, learner.rollout.vector_steps)
        most = max(most, held_draws(learner))
        learner.update()
        assert learner.memory_bytes() == predicted
    assert predicted["draws"] == most
    rows = sum(step.aggregation.gradients._rows.nbytes for step in (learner.actor_step, learner.critic_step))
    assert predicted["task gradients"] == rows


@pytest.mark.parametrize("suite", SUITES)
def test_the_predicted_memory_is_what_is_held(suite: str) -> None:
    engine, learner = make(suite)
    rollout(engine, learner)
    held = sum(field.numel() * field.element_size() for field in learner.rollout.fields.values())
    assert learner.memory_bytes()["rollout"] == held
    assert set(learner.memory_bytes()) == {"networks", "rollout", "draws"}  # per update: one draw per task
    assert learner.memory_bytes()["draws"] == held_draws(learner)
    learner.update()
    networks = 0
    for step in (learner.actor_step, learner.critic_step):
        for parameter in step.parameters:
            moments = step.optimizer.state[parameter]
            networks += sum(t.nbytes for t in (parameter, moments["exp_avg"], moments["exp_avg_sq"]))
            networks += parameter.nbytes  # its gradient, freed and made anew at every step
    assert learner.memory_bytes()["networks"] == networks
