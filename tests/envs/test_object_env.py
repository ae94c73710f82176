"""Environments whose episodes depend on more than seed and actions, and the forms in which they hand things out."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from variants import Dice, Line, Loose, Weather, Worn

from varshare_rl.envs.gymnasium_suite import GymnasiumConfig
from varshare_rl.envs.object_env import Habits
from varshare_rl.envs.objects import MakerSuite, ObjectsConfig
from varshare_rl.envs.spaces import TaskSpaces, to_native_action
from varshare_rl.errors import UserError


def objects(*makers: Callable[[], Any], workers: int = 1, horizon: int = 7) -> MakerSuite:
    makers_by_name = {f"task{index}": make for index, make in enumerate(makers)}
    return ObjectsConfig(horizon=horizon, workers=workers).build(makers_by_name)


def assert_resumes(suite: MakerSuite, steps: int, envs: int = 2, every: int = 17) -> None:
    """At many moments a new engine goes on from the state as the old one does, to the bit."""
    rng = np.random.default_rng(0)
    size = (len(suite.task_names), envs)

    def act() -> Any:
        return (
            rng.integers(int(suite.action_mask.sum(1).min()), size=size)
            if isinstance(suite.action_space, Discrete)
            else rng.uniform(-1, 1, (*size, *suite.action_space.shape)).astype(np.float32)
        )

    engine = suite.make_engine(envs, seed=0)
    engine.reset()
    for step in range(steps):
        action = act()
        if step % every == 0:
            other = suite.make_engine(envs, seed=0)
            other.load_state(engine.state())
            theirs = other.step(action)
            other.close()
            ours = engine.step(action)
            np.testing.assert_array_equal(ours.next_obs, theirs.next_obs)
            np.testing.assert_array_equal(ours.reward, theirs.reward)
        else:
            engine.step(action)
    engine.close()


def test_habits_are_found() -> None:
    suite = objects(Line, Worn, Dice, Weather)
    assert suite.habits == (Habits(), Habits(True), Habits(False, True), Habits(True, False, False))
    assert [line.split(":")[0] for line in suite.remarks()] == ["task1", "task3"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("make", [Worn, Dice])
def test_an_episode_follows_from_seed_and_actions_alone(make: Any, workers: int) -> None:
    assert_resumes(objects(make, workers=workers), steps=30, every=5)


def test_global_generators_are_left_alone() -> None:
    suite = objects(Dice)
    engine = suite.make_engine(2, 0)
    before = np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr,index]  # noqa: NPY002
    engine.reset()
    for _ in range(9):
        engine.step(np.zeros((1, 2, 2), np.float32))
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before  # type: ignore[union-attr,index]  # noqa: NPY002


def test_what_follows_no_seed_begins_anew() -> None:
    engine = objects(Weather).make_engine(1, 0)
    engine.reset()
    engine.step(np.ones((1, 1, 2), np.float32))
    other = objects(Weather).make_engine(1, 0)
    obs = other.load_state(engine.state())
    assert other.state()["slots"][0]["episode"] == 1
    assert abs(obs[0, 0, 0]) <= 0.1


@pytest.mark.parametrize("env_id", ["BipedalWalker-v3", "BipedalWalkerHardcore-v3"])
def test_walkers_are_resumed(env_id: str) -> None:
    """Their physical world outlives a reset."""
    assert_resumes(GymnasiumConfig(ids=[env_id], workers=1, horizon=90).build(), steps=400, envs=1, every=40)


FORMS: dict[str, tuple[Any, Any]] = {
    "list": (list, float),
    "column": (lambda obs: obs.reshape(-1, 1), float),
    "row": (lambda obs: obs.reshape(1, -1), float),
    "rewards_in_an_array": (np.array, lambda reward: np.array([reward])),
    "rewards_in_a_list": (np.array, lambda reward: [reward]),
    "rewards_without_dimensions": (np.array, lambda reward: np.array(reward, np.float32)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_with_a_plain_meaning_are_taken(name: str) -> None:
    form, reward = FORMS[name]
    engine = objects(lambda: Loose(form, reward)).make_engine(1, 0)
    first = engine.reset()
    step = engine.step(np.full((1, 1, 2), 0.5, np.float32))
    np.testing.assert_allclose(step.next_obs, first + 0.5, atol=1e-6)
    assert step.reward.item() == 1.0  # of the bounds -2 and 2


@pytest.mark.parametrize(
    ("form", "reward", "message"),
    [
        (lambda obs: obs[:1], float, r"task task0: an observation has shape \(1,\); this task observes 2 numbers"),
        (lambda obs: float(obs[0]), float, r"shape \(\); this task observes 2"),
        (lambda obs: np.stack([obs, obs]), float, r"shape \(2, 2\)"),
        (lambda obs: ["a", "b"], float, "is not 2 numbers"),
        (lambda obs: {"x": obs}, float, "observes 2 numbers"),
        (np.array, lambda reward: None, "task task0: a reward is None; it must be one number"),
        (np.array, lambda reward: np.zeros(2), "it must be one number"),
    ],
)
def test_forms_without_one_are_one_line(form: Any, reward: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        objects(lambda: Loose(form, reward)).make_engine(1, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "counts"),
    [
        (-1, 1, np.int64, {-1: 500, 0: 1000, 1: 500}),
        (100, 250, np.uint8, {100: 6.7, 101: 13.3, 249: 13.3, 250: 6.7}),
        (0, 255, np.uint8, {0: 4, 255: 4}),
        (-128, 127, np.int8, {-128: 4, 127: 4}),
    ],
)
def test_whole_numbers_are_rounded_within_their_bounds(low: int, high: int, dtype: Any, counts: Any) -> None:
    space = Box(low, high, (1,), dtype)
    spaces = TaskSpaces.of(Box(-1, 1, (2,)), space)
    found = [to_native_action(np.array([x], np.float32), spaces) for x in np.linspace(-1, 1, 2001)]
    assert all(space.contains(action) for action in found)
    assert found[0] == [low]
    assert found[-1] == [high]
    values = np.array([action[0] for action in found])
    assert (np.diff(values.astype(int)) >= 0).all()
    for value, count in counts.items():
        assert (values == value).sum() == pytest.approx(count, abs=1)


def test_bounds_are_kept_in_float32() -> None:
    """The middle and half of these bounds, rounded, add up to more than the upper one."""
    rng = np.random.default_rng(0)
    for low, size in zip(rng.normal(size=200), rng.uniform(0, 3, 200), strict=True):
        space = Box(np.float32(low), np.float32(low + size), (1,), np.float32)
        spaces = TaskSpaces.of(Box(-1, 1, (2,)), space)
        for x in (-7.0, -1.0, 1.0, 7.0):
            assert space.contains(to_native_action(np.array([x], np.float32), spaces))


LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    "space",
    [
        Box(-LARGEST, LARGEST, (2,), np.float32),
        Box(-1.0, LARGEST, (2,), np.float32),
        Box(-np.inf, np.inf, (2,), np.float32),
        Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (1,), np.int64),
        Box(0, np.iinfo(np.uint32).max, (1,), np.uint32),
    ],
)
def test_bounds_that_are_none_are_refused(space: Box) -> None:
    with pytest.raises(UserError, match=r"task0 acts in Box.*these are none.*env.wrappers=\[my_module:MyWrapper\]"):
        objects(lambda: Loose(actions=space))


class Sees(Line):
    """Has another observation space."""

    def __init__(self, space: Any) -> None:
        super().__init__()
        self.observation_space = space


@pytest.mark.parametrize(
    "space",
    [
        Box(0, 255, (8, 8, 3), np.uint8),
        Dict({"position": Box(-1, 1, (2,)), "goal": Box(-1, 1, (2,))}),
        Discrete(4),
        Box(-1, 1, (2, 1)),
        Box(-1, 1, ()),
    ],
)
def test_observations_that_are_no_vectors_say_what_to_do(space: Any) -> None:
    with pytest.raises(UserError, match=r"task0 observes .*env.wrappers=\[gymnasium.wrappers:FlattenObservation\]"):
        objects(lambda: Sees(space))


def test_empty_spaces_are_refused() -> None:
    with pytest.raises(UserError, match=r"observes .* empty"):
        objects(lambda: Sees(Box(-1, 1, (0,))))
    with pytest.raises(UserError, match=r"acts in .* empty"):
        objects(lambda: Loose(actions=Box(-1, 1, (0,))))


def test_the_line_can_be_obeyed() -> None:
    flat = ["gymnasium.wrappers:FlattenObservation"]
    assert GymnasiumConfig(ids=["CarRacing-v3"], wrappers=flat).build().observation_space.shape == (27648,)
    assert GymnasiumConfig(ids=["Blackjack-v1"], wrappers=flat, horizon=9).build().observation_space.shape == (45,)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "none", "a.xml"), TypeError("no such\nargument"), SystemExit(3)]
)
def test_constructors_that_fail_are_one_line(error: BaseException) -> None:
    def fail() -> Any:
        raise error

    gymnasium.register("Broken-v0", fail)
    try:
        for build in (lambda: objects(fail), lambda: GymnasiumConfig(ids=["Broken-v0"]).build()):
            with pytest.raises(UserError, match=f"(task0|Broken-v0).*{type(error).__name__}") as caught:
                build()
            assert "\n" not in str(caught.value)
    finally:
        gymnasium.registry.pop("Broken-v0")
