from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import build, collect
from torch import Tensor

from varshare_rl.algorithms.base import AgentContext, TaskSpec
from varshare_rl.algorithms.sac import SAC, SACConfig
from varshare_rl.data.normalizers import RewardScale
from varshare_rl.envs.cartpole import CartPoleConfig
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.errors import UserError
from varshare_rl.nn import Posterior, SharedConfig, VarShareLoRAConfig
from varshare_rl.nn.critic import TwinQ
from varshare_rl.nn.parameters import total_kl
from varshare_rl.nn.stochastic import posterior_mean
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.nn.weight_sampler import Resample
from varshare_rl.optim.elbo import DrawConfig, Elbo, ElboConfig, TargetDraw
from varshare_rl.types import Transition

TASKS, ENVS = 2, 4
ENV = PointMassConfig(tasks=["normal_left", "normal_right"], envs_per_task=ENVS)
OPTIONS = SACConfig(replay_capacity_per_task=500, batch_per_task=16, start_transitions_per_task=40)


def make(started: bool = True, draw: DrawConfig | None = None, **options: Any) -> SAC:
    """A SAC, with enough transitions to learn from if ``started``."""
    _, engine, learner = build(ENV, replace(OPTIONS, **options), draw=draw or DrawConfig())
    assert isinstance(learner, SAC)
    if started:
        collect(engine, learner, torch.from_numpy(engine.reset()), 12)
    return learner


def clone(tensors: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def test_discrete_actions_are_refused() -> None:
    with pytest.raises(UserError, match="algorithm=sac needs Box actions") as error:
        build(CartPoleConfig(), SACConfig())
    assert "\n" not in str(error.value)
    assert "algorithm=ppo" in str(error.value)


def test_acts_at_random_until_it_starts() -> None:
    _, engine, learner = build(ENV, OPTIONS)
    obs = torch.from_numpy(engine.reset())
    wide = obs[:, :1].expand(TASKS, 2_000, 4)
    actions = learner.act(wide)
    assert actions.shape == (TASKS, 2_000, 2)
    assert actions.abs().max() <= 1
    assert actions.std() == pytest.approx(3**-0.5, rel=0.05)  # uniform on [-1, 1]
    collect(engine, learner, obs, 10)
    torch.manual_seed(1)
    first = learner.act(wide)
    with torch.no_grad():
        for parameter in learner.actor.parameters():
            parameter.add_(1.0)
    torch.manual_seed(1)
    assert not torch.equal(first, learner.act(wide))  # the actor decides now


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_the_noise_of_the_policy_goes_on_from_step_to_step(correlation: float) -> None:
    torch.manual_seed(0)
    options = replace(
        OPTIONS, noise_correlation=correlation, start_transitions_per_task=500, replay_capacity_per_task=2000
    )
    _, engine, learner = build(replace(ENV, envs_per_task=500), options, draw=DrawConfig(acting=Resample.mean))
    obs, noise = collect(engine, learner, torch.from_numpy(engine.reset()), 1), []
    for _ in range(2):
        with torch.no_grad(), posterior_mean(learner.actor):
            policy = learner.policy(learner.normalizer(obs))
        obs = collect(engine, learner, obs, 1)
        place = learner.replay.position
        action = learner.replay.rows[:, place - 500 : place, learner.spec.obs_size :][..., :2]
        noise.append((torch.atanh(action.clamp(-0.9999, 0.9999)) - policy.mean) / policy.log_std.exp())
    pair = torch.stack([each.flatten() for each in noise])
    assert float(torch.corrcoef(pair)[0, 1]) == pytest.approx(correlation, abs=0.06)


def test_updates_fall_due_by_transitions() -> None:
    _, engine, learner = build(ENV, replace(OPTIONS, updates_per_transition_per_task=0.125))
    obs, done = torch.from_numpy(engine.reset()), []
    for _ in range(20):
        obs = collect(engine, learner, obs, 1)
        while learner.ready():
            learner.update()
        done.append(learner.updates)
    # 4 transitions per task and step: 40 after the tenth one, from which on an update is due every second
    assert done == [0] * 10 + [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def spec(mask: list[list[bool]]) -> AgentContext:
    tasks, actions = len(mask), len(mask[0])
    shapes = TaskSpec(tasks, ENVS, 4, actions, False, torch.tensor(mask), torch.device("cpu"), 100)
    options = SharedConfig(hidden=[8])
    return AgentContext(shapes, lambda a, b: options.build(a, b, tasks, Posterior()), Elbo(ElboConfig(), tasks))


def test_target_entropy_counts_a_tasks_own_dimensions() -> None:
    learner = SAC(OPTIONS, spec([[True, True, True], [True, False, False]]))
    assert learner.target_entropy.tolist() == [-3.0, -1.0]
    random = learner.act(torch.zeros(2, 50, 4))
    assert (random[1, :, 1:] == 0).all()
    assert (random[0] != 0).all()


def test_every_task_has_an_entropy_coefficient_of_its_own() -> None:
    learner = make(entropy_learning_rate=0.01, initial_entropy_coefficient=0.3)
    assert learner.log_alpha.shape == (TASKS,)
    torch.testing.assert_close(learner.log_alpha.exp(), torch.full((TASKS,), 0.3))
    learner.target_entropy = torch.tensor([50.0, -50.0])  # out of reach above, and below
    for _ in range(3):
        learner.update()
    assert learner.log_alpha[0] > torch.tensor(0.3).log() + 0.02
    assert learner.log_alpha[1] < torch.tensor(0.3).log() - 0.02


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The targets of every critic loss from here on."""
    seen: list[Tensor] = []
    plain = TwinQ.loss

    def watched(critic: TwinQ, obs: Tensor, action: Tensor, ids: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(target)
        return plain(critic, obs, action, ids, target)

    monkeypatch.setattr(TwinQ, "loss", watched)
    return seen


def fill(learner: SAC, terminated: list[bool], truncated: list[bool]) -> None:
    """Transitions of reward 1; each task ends at every step in its own way."""
    ends = [torch.tensor(flags).unsqueeze(1).expand(TASKS, ENVS) for flags in (terminated, truncated)]
    for _ in range(12):
        obs = torch.randn(TASKS, ENVS, 4)
        action = learner.act(obs)
        learner.observe(Transition(obs, action, torch.ones(TASKS, ENVS), *ends, torch.randn(TASKS, ENVS, 4)))


@pytest.mark.parametrize("batch", [8, 16])
def test_a_time_limit_is_bootstrapped_and_an_end_is_not(
    targets: list[Tensor], monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    learner = make(started=False, discount=0.5, batch_per_task=batch)
    values = torch.tensor([10.0, 12.0]).view(2, 1, 1)  # the smaller one counts
    monkeypatch.setattr(learner.target_critic, "forward", lambda obs, action, ids: values.expand(2, *obs.shape[:2]))
    with torch.no_grad():
        learner.log_alpha.fill_(-torch.inf)  # no entropy bonus
    fill(learner, terminated=[False, True], truncated=[True, False])
    learner.update()
    (target,) = targets  # of both critics
    torch.testing.assert_close(target, torch.tensor([[6.0], [1.0]]).expand(TASKS, batch))  # 1 + 0.5 * 10, and 1


def test_the_target_has_the_entropy_bonus_of_its_own_task(
    targets: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(started=False, discount=0.5)
    monkeypatch.setattr(learner.target_critic, "forward", lambda obs, action, ids: torch.zeros(2, *obs.shape[:2]))
    with torch.no_grad():
        learner.log_alpha.copy_(torch.tensor([0.0, 2.0]).log())  # coefficients 0 and 2
    fill(learner, terminated=[False, False], truncated=[False, False])
    log_probs: list[Tensor] = []
    plain = learner.actor.forward

    class Watched:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def sample(self) -> Any:
            drawn = self.inner.sample()
            log_probs.append(drawn.log_prob.detach())
            return drawn

    monkeypatch.setattr(learner.actor, "forward", lambda obs, ids: Watched(plain(obs, ids)))
    learner.update()
    torch.testing.assert_close(targets[0][0], torch.ones(16))
    torch.testing.assert_close(targets[0][1], 1.0 - 0.5 * 2.0 * log_probs[0][1])


@pytest.mark.parametrize("targets", TargetDraw)
def test_target_critics_follow_at_their_rate(targets: TargetDraw) -> None:
    """Spreads do where targets are drawn; means do without them."""
    learner = make(target_rate=0.25, draw=DrawConfig(targets=targets))
    learner.update()
    before = dict(
        zip(dict(learner.critic.named_parameters()), clone(learner.target_critic.parameters()), strict=True)
    )
    learner.update()
    critic = dict(learner.critic.named_parameters())
    sigmas = {name for name in critic if ".rhos_" in name}
    assert sigmas
    for name, after in learner.target_critic.named_parameters():
        if targets is TargetDraw.mean and name in sigmas:
            assert torch.equal(after, before[name])
        else:
            torch.testing.assert_close(after, 0.75 * before[name] + 0.25 * critic[name].detach())
            assert not torch.equal(after, before[name])


def test_target_critics_start_as_copies_and_use_their_means() -> None:
    learner = make()
    for one, other in zip(learner.critic.parameters(), learner.target_critic.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not other.requires_grad
    obs, action, ids = torch.randn(TASKS, 5, 4), torch.randn(TASKS, 5, 2), torch.arange(TASKS)
    assert torch.equal(learner.target_critic(obs, action, ids), learner.target_critic(obs, action, ids))
    assert not torch.equal(learner.critic(obs, action, ids), learner.critic(obs, action, ids))


def test_the_actors_loss_leaves_the_critics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make()
    seen: list[Any] = []
    plain = learner.actor_step.aggregate

    def watched(losses: Tensor) -> None:
        gradients = [parameter.grad for parameter in learner.critic.parameters()]
        seen.append([None if grad is None else grad.clone() for grad in gradients])
        critics = clone(learner.critic.parameters())
        plain(losses)
        after = [parameter.grad for parameter in learner.critic.parameters()]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(seen[-1], after, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(critics, learner.critic.parameters(), strict=True))

    actor = clone(learner.actor.parameters())
    monkeypatch.setattr(learner.actor_step, "aggregate", watched)
    learner.update()
    assert len(seen) == 1
    assert all(parameter.requires_grad for parameter in learner.critic.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(actor, learner.actor.parameters(), strict=True))
    critics = clone(learner.critic.parameters())
    learner.update()  # they still learn afterwards
    assert not any(torch.equal(a, b) for a, b in zip(critics, learner.critic.parameters(), strict=True))


def test_weights_are_drawn_anew_and_evaluation_uses_the_mean() -> None:
    learner = make()
    obs = torch.randn(TASKS, 3, 4)
    assert {layer.noise for _, layer in stochastic_layers(learner.actor)} == {None}
    assert not torch.equal(learner.actor(obs, torch.arange(2)).mean, learner.actor(obs, torch.arange(2)).mean)
    policy = learner.evaluation_policy(3)
    assert torch.equal(policy.act(obs), policy.act(obs))


def test_the_divergence_weighs_on_actor_and_critics() -> None:
    nats = {}
    for weight in (0.0, 10.0):
        _, engine, learner = build(ENV, OPTIONS, VarShareLoRAConfig(hidden=[16]), kl_weight=weight)
        collect(engine, learner, torch.from_numpy(engine.reset()), 12)
        for _ in range(20):
            learner.update()
        nats[weight] = [float(total_kl(module, TASKS).detach().sum()) for module in (learner.actor, learner.critic)]
    assert all(heavy < light - 1.0 for heavy, light in zip(nats[10.0], nats[0.0], strict=True))


def test_replay_holds_raw_transitions_and_batches_are_normalised(
    targets: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(started=False, normalize_observations=True, reward_scale=RewardScale.return_std)
    seen: list[Tensor] = []

    def critic(obs: Tensor, action: Tensor, ids: Tensor) -> Tensor:
        seen.append(obs)
        return torch.zeros(2, *obs.shape[:2])

    monkeypatch.setattr(learner.target_critic, "forward", critic)
    with torch.no_grad():
        learner.log_alpha.fill_(-torch.inf)
    fill(learner, terminated=[False, False], truncated=[False, False])
    raw = learner.replay.rows[:, :48]
    assert raw[..., 6].unique().tolist() == [1.0]
    with torch.no_grad():
        learner.replay.rows[..., 8:] = 5.0  # every next observation
    learner.update()
    value_std = learner.reward_scaler.moments.std().float()
    torch.testing.assert_close(targets[0], (1.0 / value_std).expand(TASKS, 16))
    mean, std = raw[..., :4].mean(1), raw[..., :4].std(1, correction=0)
    torch.testing.assert_close(
        seen[0], ((5.0 - mean) / std).unsqueeze(1).expand(TASKS, 16, 4), rtol=1e-4, atol=1e-4
    )
