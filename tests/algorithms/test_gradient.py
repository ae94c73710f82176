"""Steps of PPO and SAC with every combination of gradients: they learn, and go on bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import build, collect

from varshare_rl.algorithms.ppo import PPOConfig
from varshare_rl.algorithms.sac import SACConfig
from varshare_rl.assemble import build_algorithm, build_suite
from varshare_rl.config import TrainConfig
from varshare_rl.config_checks import check_config
from varshare_rl.data.normalizers import RewardScale
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.envs.suite import VectorEngine
from varshare_rl.nn import IndependentConfig, VarShareLoRAConfig
from varshare_rl.nn.config import Blocks
from varshare_rl.nn.critic import CriticConfig, ValueLoss
from varshare_rl.nn.parameters import shared_parameters
from varshare_rl.optim.divergence_guard import DivergenceGuardConfig
from varshare_rl.optim.gradient import MEAN, TEMPERATURE, GradientConfig
from varshare_rl.optim.optimizer import OptimizerConfig, Schedule
from varshare_rl.optim.step import JacobianAggregation, LossStep, TemperatureAggregation
from varshare_rl.run.checkpoint import load_checkpoint, save_checkpoint

ALGORITHMS = {
    "ppo": PPOConfig(rollout_transitions_per_task=20, epochs=2, minibatches=2),
    "sac": SACConfig(
        start_transitions_per_task=8,
        batch_per_task=8,
        replay_capacity_per_task=100,
        updates_per_transition_per_task=0.25,
    ),
}
SCHEDULED = OptimizerConfig(schedule=Schedule.cosine, warmup=0.2, weight_decay=0.1, rho_lr_scale=2.0)


def make(
    algorithm: str,
    actor: str,
    critic: str,
    divergence_guard: DivergenceGuardConfig | None = None,
    **values: Any,
) -> tuple[VectorEngine, Any]:
    torch.manual_seed(0)
    config = TrainConfig(
        PointMassConfig(envs_per_task=4, horizon=10),
        ALGORITHMS[algorithm],
        VarShareLoRAConfig(hidden=[8], layer_norm=True),
        critic=CriticConfig(**values),
        gradient=GradientConfig(actor, critic),
        optimizer=SCHEDULED,
        divergence_guard=divergence_guard or DivergenceGuardConfig(),
    )
    check_config(config)
    suite = build_suite(config)
    return suite.make_engine(4, 0), build_algorithm(config, suite, torch.device("cpu"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_reset_forgets_what_steps_remember(algorithm: str) -> None:
    """Running losses of the old networks, for one, would call every loss of the new ones an explosion."""
    methods, divergence_guard = (
        ("gradnorm", "gradvac"),
        DivergenceGuardConfig(explosion=1000.0),
    )
    engine, learner = make(algorithm, *methods, divergence_guard)
    _, fresh = make(algorithm, *methods, divergence_guard)
    train(engine, learner, torch.from_numpy(engine.reset()), range(12))
    memories = [(step.aggregation.aggregator.state(), step.divergence_guard.state()) for step in steps(learner)[:2]]
    assert memories[0][0]["first"] is not None
    assert memories[1][0]["targets"] is not None
    assert all(guarded["steps"] > 0 and guarded["average"] is not None for _, guarded in memories)
    learner.reset_networks()
    for step, new in zip(steps(learner), steps(fresh), strict=True):
        assert not step.optimizer.state
        assert step.divergence_guard.state() == new.divergence_guard.state() | {
            "masked": step.divergence_guard.masked
        }
        if isinstance(step.aggregation, JacobianAggregation):
            assert str(step.aggregation.aggregator.state()) == str(new.aggregation.aggregator.state())


def test_all_steps_take_note_of_how_far_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA it is then that a guard finds out about tasks to leave out; until then it drops whole steps."""
    _, learner = make("sac", MEAN, MEAN)
    noted = []
    for step in steps(learner):
        monkeypatch.setattr(step.divergence_guard, "look", lambda step=step: noted.append(step))
    learner.advance(0.5)
    assert noted == steps(learner)


def steps(learner: Any) -> list[LossStep]:
    entropy = [learner.entropy_step] if hasattr(learner, "entropy_step") else []
    return [learner.actor_step, learner.critic_step, *entropy]


def train(engine: VectorEngine, learner: Any, obs: torch.Tensor, steps: range) -> torch.Tensor:
    for step in steps:
        obs = collect(engine, learner, obs, 1)
        learner.advance((step + 1) / 30)
        while learner.ready():
            learner.update()
    return obs


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("actor", "critic"),
    [
        pytest.param("gradvac", "nashmtl", marks=pytest.mark.slow),
        ("gradnorm", "pcgrad"),
        (TEMPERATURE, "graddrop"),
    ],
)
def test_two_halves_are_one_whole(tmp_path: Any, algorithm: str, actor: str, critic: str) -> None:
    if actor == TEMPERATURE and algorithm == "ppo":
        actor = MEAN
    engine, whole = make(algorithm, actor, critic)
    obs = train(engine, whole, torch.from_numpy(engine.reset()), range(12))
    assert whole.updates > 0
    path = save_checkpoint(tmp_path, "last", 12, {"algorithm": whole.state(), "engine": engine.state()})
    random = torch.get_rng_state()
    train(engine, whole, obs, range(12, 22))

    other_engine, half = make(algorithm, actor, critic)
    state = load_checkpoint(path)
    half.load_state(state["algorithm"])
    obs = torch.from_numpy(other_engine.load_state(state["engine"]))
    torch.set_rng_state(random)
    train(other_engine, half, obs, range(12, 22))
    assert half.updates == whole.updates
    for one, other in zip(whole.actor.parameters(), half.actor.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole.critic.parameters(), half.critic.parameters(), strict=True):
        assert torch.equal(one, other)


def test_actor_and_critic_have_their_own() -> None:
    _, learner = make("sac", TEMPERATURE, "pcgrad")
    assert isinstance(learner.actor_step.aggregation, TemperatureAggregation)
    assert learner.actor_step.aggregation.log_temperature is learner.log_alpha
    assert isinstance(learner.critic_step.aggregation, JacobianAggregation)


def test_no_shared_parameter_of_the_networks_needs_a_pass_per_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for algorithm in ALGORITHMS:
        engine, learner = make(algorithm, "pcgrad", "pcgrad")
        for step in (learner.actor_step, learner.critic_step):
            monkeypatch.delattr(type(step.aggregation.gradients), "_one_at_a_time", raising=False)
        train(engine, learner, torch.from_numpy(engine.reset()), range(12))
        assert learner.updates > 0
        for step in (learner.actor_step, learner.critic_step):
            assert len(step.aggregation.gradients.reached) == len(step.aggregation.gradients.shared)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "values", [{}, {"loss": ValueLoss.categorical}, {"loss": ValueLoss.categorical, "popart": True}], ids=str
)
def test_the_rest_learns_on_when_one_task_breaks(algorithm: str, broken: float, values: dict[str, Any]) -> None:
    """Broken is a reward in PPO's rollout, or SAC's entropy coefficient: rewards go through a scaler there."""
    engine, learner = make(algorithm, MEAN, "pcgrad", **values)
    obs = train(engine, learner, torch.from_numpy(engine.reset()), range(6))
    fields = learner.rollout.fields if algorithm == "ppo" else None
    before = [parameter.detach().clone() for parameter in learner.actor.parameters()]
    for step in range(6, 20):
        obs = collect(engine, learner, obs, 1)
        if fields is None:
            learner.log_alpha.data[3] = broken
        elif learner.ready():
            learner.rollout.fields["reward"][3] = broken
        learner.advance(step / 30)
        while learner.ready():
            learner.update()
    masked = learner.masked_steps().tolist()
    assert masked[3] > 0
    assert sum(masked) == masked[3]
    after = list(learner.actor.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("network", "critic"),
    [
        (IndependentConfig(hidden=[8]), CriticConfig(popart=True)),
        (IndependentConfig(hidden=[8], layer_norm=True), CriticConfig(loss=ValueLoss.categorical)),
        (IndependentConfig(hidden=[8, 8], blocks=Blocks.bronet), CriticConfig(blocks=Blocks.mlp, layer_norm=True)),
        (IndependentConfig(hidden=[8], layer_norm=True), CriticConfig(hidden=[8, 8], blocks=Blocks.bronet)),
    ],
)
def test_independent_networks_learn_nothing_from_other_tasks(
    algorithm: str, network: IndependentConfig, critic: CriticConfig
) -> None:
    """Rewards of task 1 that are a thousand times larger change its networks, and no other's by a bit."""
    learnt = []
    for factor in (1.0, 1000.0):
        options = replace(ALGORITHMS[algorithm], reward_scale=RewardScale.none)
        env = PointMassConfig(envs_per_task=4, horizon=10, reward_scales=[1.0, factor, *[1.0] * 6])
        _, engine, learner = build(env, options, network, critic=critic)
        assert [shared_parameters(module) for module in learner.trained_modules().values()] == [[], []]
        train(engine, learner, torch.from_numpy(engine.reset()), range(5))
        assert learner.updates > 1
        modules = learner.trained_modules()
        learnt.append({f"{part}.{name}": p for part in modules for name, p in modules[part].named_parameters()})
    for name, parameter in learnt[0].items():
        same = (parameter == learnt[1][name]).view(8, -1).all(1)
        assert same.tolist() == [task != 1 for task in range(8)], name
