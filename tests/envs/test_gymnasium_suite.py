"""The gymnasium suite: padding, masks, action bounds, names, seeds, errors."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from varshare_rl.envs.gymnasium_suite import GymnasiumConfig, GymnasiumMaker, GymnasiumSuite
from varshare_rl.envs.slots import EngineSpec
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import UserError


def suite(*ids: str, horizon: int | None = None, workers: int = 1) -> GymnasiumSuite:
    return GymnasiumSuite(GymnasiumConfig(ids=list(ids), horizon=horizon, workers=workers))


def test_box_tasks_are_padded_and_masked() -> None:
    made = suite("Pendulum-v1", "MountainCarContinuous-v0", "Hopper-v5")
    assert isinstance(made, Suite)
    assert not made.has_success
    assert made.observation_space.shape == (11,)
    assert made.action_space == Box(-1.0, 1.0, (3,), np.float32)
    np.testing.assert_array_equal(made.action_mask, [[1, 0, 0], [1, 0, 0], [1, 1, 1]])
    assert made.horizon == 1000
    obs = made.make_engine(2, 0).reset()
    assert not obs[0, :, 3:].any()
    assert not obs[1, :, 2:].any()
    assert obs[2].all()


def test_discrete_tasks_share_the_most_choices() -> None:
    made = suite("CartPole-v1", "Acrobot-v1")
    assert made.action_space == Discrete(3)
    np.testing.assert_array_equal(made.action_mask, [[True, True, False], [True, True, True]])
    engine = made.make_engine(1, 0)
    engine.reset()
    engine.step(np.array([[1], [2]]))
    with pytest.raises(ValueError, match="actions 0 to 1"):
        engine.step(np.array([[2], [2]]))


def test_an_episode_is_the_one_gymnasium_plays() -> None:
    """Same seed, rescaled actions: bounds of Pendulum are [-2, 2]."""
    engine = suite("Pendulum-v1", horizon=5).make_engine(1, seed=3)
    obs = engine.reset()
    spec = EngineSpec(1, 1, 3, (1,), "float32", seed=3, evaluation=False)
    env = gymnasium.make("Pendulum-v1")
    for episode in range(2):
        expected = env.reset(seed=spec.episode(0, episode).integer_seed())[0]
        np.testing.assert_array_equal(obs[0, 0], expected)
        for k, action in enumerate((0.5, -1.0, 0.0, 0.25, 1.0)):
            step = engine.step(np.full((1, 1, 1), action, np.float32))
            expected, reward, *_ = env.step(np.array([2 * action], np.float32))
            np.testing.assert_array_equal(step.next_obs[0, 0], expected)
            assert step.reward[0, 0] == np.float32(reward)
            assert step.truncated[0, 0] == (k == 4)
        obs = step.obs


def test_actions_beyond_the_bounds_are_clipped() -> None:
    results = []
    for action in (1.0, 7.0):
        engine = suite("Pendulum-v1").make_engine(1, 0)
        engine.reset()
        results.append(engine.step(np.full((1, 1, 1), action, np.float32)).reward)
    np.testing.assert_array_equal(results[0], results[1])


def test_termination_is_not_truncation() -> None:
    engine = suite("CartPole-v1").make_engine(1, 0)
    engine.reset()
    for _ in range(30):
        step = engine.step(np.zeros((1, 1), np.int64))
        if step.terminated[0, 0]:
            break
    assert step.terminated[0, 0]
    assert not step.truncated[0, 0]
    assert abs(step.next_obs[0, 0, 2]) > 0.2  # fallen
    assert abs(step.obs[0, 0, 2]) < 0.06  # upright again


def test_repeated_ids_are_told_apart() -> None:
    made = suite("CartPole-v1", "Acrobot-v1", "CartPole-v1")
    assert made.task_names == ("CartPole-v1", "Acrobot-v1", "CartPole-v1#2")
    obs = made.make_engine(1, 0).reset()
    assert not np.array_equal(obs[0], obs[2])


@pytest.mark.parametrize("env_id", ["Hopper-v5", "LunarLander-v3"])
def test_state_continues_bit_for_bit_in_a_fresh_process(env_id: str) -> None:
    made = suite(env_id, env_id, horizon=30)
    discrete = isinstance(made.action_space, Discrete)
    rng = np.random.default_rng(0)

    def actions() -> np.ndarray:
        return rng.integers(4, size=(2, 1)) if discrete else rng.uniform(-1, 1, (2, 1, 3))

    engine = made.make_engine(1, 0)
    engine.reset()
    for _ in range(45):
        engine.step(actions())
    state = engine.state()
    assert min(slot["episode"] for slot in state["slots"]) > 0
    planned = [actions() for _ in range(40)]
    expected = [engine.step(action) for action in planned]
    fresh = suite(env_id, env_id, horizon=30, workers=2).make_engine(1, 0)
    fresh.load_state(state)
    for action, one in zip(planned, expected, strict=True):
        other = fresh.step(action)
        np.testing.assert_array_equal(one.obs, other.obs)
        np.testing.assert_array_equal(one.next_obs, other.next_obs)
        np.testing.assert_array_equal(one.reward, other.reward)
    fresh.close()


def test_arguments_for_all_for_an_id_and_for_a_task() -> None:
    config = GymnasiumConfig(
        ids=["Pendulum-v1", "Pendulum-v1", "Ant-v5"],
        names=["light", "heavy", "ant"],
        kwargs={"render_mode": None, "Pendulum-v1": {"g": 5.0}, "heavy": {"g": 20.0}},
        workers=1,
    )
    made = config.build()
    assert made.task_names == ("light", "heavy", "ant")
    assert made.provenance["kwargs"] == str(config.kwargs)
    chosen = [maker.kwargs for maker in made.makers if isinstance(maker, GymnasiumMaker)]
    assert chosen == [{"render_mode": None, "g": 5.0}, {"render_mode": None, "g": 20.0}, {"render_mode": None}]
    assert made.makers[1]().get_wrapper_attr("g") == 20.0


def test_wrappers_are_imported_by_name() -> None:
    rewards = []
    for wrappers in ([], ["variants:Doubled"], ["variants:Doubled", "variants:Doubled"]):
        made = GymnasiumConfig(ids=["CartPole-v1"], wrappers=wrappers, workers=1).build()
        assert made.provenance.get("wrappers") == (",".join(wrappers) or None)
        assert made.horizon == 500
        engine = made.make_engine(1, 0)
        engine.reset()
        rewards.append(engine.step(np.zeros((1, 1), np.int64)).reward.item())
    assert rewards == [1.0, 2.0, 4.0]
    flat = GymnasiumConfig(ids=["FrozenLake-v1"], wrappers=["gymnasium.wrappers:FlattenObservation"]).build()
    assert flat.observation_space.shape == (16,)


def test_success_is_read_where_it_is_reported() -> None:
    gymnasium.register("Line-v0", "variants:Line", max_episode_steps=5)
    try:
        assert GymnasiumConfig(ids=["Line-v0"]).build().has_success
        assert not GymnasiumConfig(ids=["Line-v0", "Pendulum-v1"]).build().has_success
        assert not GymnasiumConfig(ids=["Line-v0"], success=False).build().has_success
    finally:
        gymnasium.registry.pop("Line-v0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kwargs": {"gravity": 3}}, "cannot make .* 'CartPole-v1': TypeError.*gravity"),
        ({"kwargs": [3]}, r"kwargs=\[3\] is no dict"),
        ({"kwargs": {"CartPole-v1": 3}}, "CartPole-v1=3: under a task's name"),
        ({"wrappers": ["no_such_module:A"]}, "cannot wrap CartPole-v1 .*'no_such_module:A'"),
        ({"wrappers": ["variants"]}, r"cannot wrap CartPole-v1 .*\(module:Class\)"),
        ({"names": ["a", "b"]}, "for 1 ids: give each id a name"),
    ],
)
def test_impossible_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        GymnasiumConfig(ids=["CartPole-v1"], **options).build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "horizon", "message"),
    [
        ([], None, "set ids="),
        (["Hoper-v5"], None, "cannot make .* 'Hoper-v5': .*Hopper"),
        (["no_such_module:Env-v0"], None, "cannot make"),
        (["Hopper-v5", "CartPole-v1"], None, r"Hopper-v5 \(Box\), CartPole-v1 \(Discrete\); run them apart"),
        (["FrozenLake-v1"], None, "only Box vectors"),
        (["CarRacing-v3"], None, "only Box vectors"),
        (["CartPole-v1"], 0, "horizon=0"),
    ],
)
def test_errors_are_one_line(ids: list[str], horizon: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        suite(*ids, horizon=horizon)
    assert "\n" not in str(caught.value)


def test_conditions() -> None:
    provenance = suite("CartPole-v1").provenance
    assert provenance["gymnasium"] == gymnasium.__version__
    assert provenance["ids"] == "CartPole-v1"
    assert provenance["horizon"] == 500
