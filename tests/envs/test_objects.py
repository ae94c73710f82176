"""Suites of environment objects: padding, scaling, success, workers, saved spaces, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from omegaconf import OmegaConf
from variants import Choices, Line, long, short

from varshare_rl.envs.object_env import Maker
from varshare_rl.envs.objects import ObjectsConfig, ObjectSuite
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.envs.spaces import TaskSpaces, to_native_action, to_policy_observation
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import UserError

TWO: dict[str, Maker] = {"short": short, "long": long}


def suite(makers: dict[str, Any] | None = None, horizon: int | None = 5, **options: Any) -> ObjectSuite:
    return ObjectsConfig(horizon=horizon, **options).build(makers or TWO)


def test_tasks_are_padded_scaled_and_reset_by_seed() -> None:
    made = suite()
    assert isinstance(made, Suite)
    assert made.task_names == ("short", "long")
    assert made.has_success
    assert made.horizon == 5
    assert made.action_space == Box(-1.0, 1.0, (2,), np.float32)
    engine = made.make_engine(2, seed=0)
    obs = engine.reset()
    assert obs.shape == (2, 2, 3)
    np.testing.assert_array_equal(obs[0, :, 2], 0.0)
    assert len(np.unique(obs[..., 0])) == 4
    for k in range(5):
        step = engine.step(np.array([[[0.25, 0.0]] * 2, [[-5.0, 1.0]] * 2], np.float32))
        np.testing.assert_allclose(step.next_obs[0, :, 0], obs[0, :, 0] + 0.5, atol=1e-6)
        np.testing.assert_allclose(step.next_obs[1, :, 0], obs[1, :, 0] - 2.0, atol=1e-6)  # clipped
        np.testing.assert_array_equal(step.reward, [[0.5] * 2, [1.0] * 2])
        np.testing.assert_array_equal(step.success[0], step.next_obs[0, :, 0] > 1.0)
        assert step.truncated.all() == (k == 4)
        assert not step.terminated.any()
        obs = step.obs
    engine.close()


def test_tasks_choose_and_order() -> None:
    assert suite(tasks=["long"]).task_names == ("long",)
    assert suite(tasks=["long", "short"]).task_names == ("long", "short")


@pytest.mark.parametrize(("key", "expected"), [("success", True), ("is_success", True), (None, False)])
def test_success_is_read_from_the_info(key: str | None, expected: bool) -> None:
    made = suite({"a": lambda: Line(goal=0.5, key=key)})
    assert made.has_success == expected
    engine = made.make_engine(1, 0)
    engine.reset()
    assert engine.step(np.ones((1, 1, 2), np.float32)).success.item() == expected
    assert suite({"a": lambda: Line(key=key)}, success=not expected).has_success != expected


def test_own_time_limits_are_found() -> None:
    made = suite({"a": lambda: gymnasium.wrappers.TimeLimit(short(), 7)}, horizon=None)
    assert made.horizon == 7
    assert suite({"a": lambda: gymnasium.make("Pendulum-v1")}, horizon=None).horizon == 200


def test_choices_may_start_anywhere() -> None:
    engine = suite({"a": Choices, "b": Choices}).make_engine(1, 0)
    engine.reset()
    np.testing.assert_array_equal(engine.step(np.array([[0], [2]])).reward[:, 0], [-1.0, 1.0])


def test_workers_give_the_same_and_take_what_they_can_import() -> None:
    one, two = suite().make_engine(2, 3), suite(workers=2).make_engine(2, 3)
    assert (one.workers, two.workers) == (1, 2)
    np.testing.assert_array_equal(one.reset(), two.reset())
    action = np.full((2, 2, 2), 0.3, np.float32)
    for _ in range(7):
        a, b = one.step(action), two.step(action)
        np.testing.assert_array_equal(a.obs, b.obs)
        np.testing.assert_array_equal(a.reward, b.reward)
    two.close()
    made = suite({"a": lambda: Line(), "b": lambda: Line()}, workers=2)
    with pytest.raises(UserError, match="use workers=1") as caught:
        made.make_engine(1, 0)
    assert "\n" not in str(caught.value)


def test_a_maker_that_workers_do_not_find_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of a script or notebook is named there, and worker processes have another main module."""
    import __main__

    monkeypatch.setattr(short, "__module__", "__main__")
    monkeypatch.setattr(__main__, "short", short, raising=False)
    engine = suite({"a": short, "b": short}, workers=2).make_engine(1, 0)
    with pytest.raises(UserError, match=r"cannot import.*short.*workers=1") as caught:
        engine.reset()
    assert "\n" not in str(caught.value)


def test_saved_spaces_describe_the_tasks_without_environments() -> None:
    config = ObjectsConfig(horizon=5)
    made = config.build(TWO)
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    loaded: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ObjectsConfig), OmegaConf.create(text)))
    bare = loaded.build()
    for name in ("task_names", "has_success", "horizon", "action_space", "observation_space", "descriptions"):
        assert getattr(bare, name) == getattr(made, name)
    np.testing.assert_array_equal(bare.action_mask, made.action_mask)
    with pytest.raises(UserError, match=r"vs\.load\(folder, envs="):
        bare.make_engine(1, 0)
    assert loaded.build(TWO).descriptions == made.descriptions
    with pytest.raises(UserError, match=r"differ from those of the saved run.*\(short\)"):
        loaded.build(TWO | {"short": long})
    with pytest.raises(UserError, match="Python objects"):
        ObjectsConfig().build()


def test_actions_and_observations_of_batches() -> None:
    spaces = suite().native_spaces(0)
    padded = to_policy_observation([[1.0, 2.0], [3.0, 4.0]], spaces)
    np.testing.assert_array_equal(padded, [[1, 2, 0], [3, 4, 0]])
    assert padded.dtype == np.float32
    with pytest.raises(UserError, match=r"shape \(3,\).*2 numbers"):
        to_policy_observation(np.zeros(3), spaces)
    native = to_native_action(np.array([[1.0, 0.0, 9.0], [-3.0, -1.0, 9.0]], np.float32), spaces)
    np.testing.assert_array_equal(native, [[2.0, 0.5], [-2.0, 0.0]])
    assert native.dtype == np.float64
    choices = TaskSpaces.of(Choices.observation_space, Choices.action_space, 4)
    assert to_native_action(np.int64(0), choices) == -1
    np.testing.assert_array_equal(to_native_action(np.array([0, 2]), choices), [-1, 1])
    with pytest.raises(ValueError, match="actions 0 to 2"):
        to_native_action(3, choices)


def test_every_suite_describes_its_tasks() -> None:
    spaces = PointMassConfig().build().native_spaces(0)
    assert spaces == TaskSpaces(4, 4, (-1.0, -1.0), (1.0, 1.0), "float32")
    action = np.array([0.3, -0.7], np.float32)
    np.testing.assert_array_equal(to_native_action(action, spaces), action)


def _fails() -> Any:
    raise RuntimeError("no\nlicence")


class _Falls(Line):
    def step(self, action: Any) -> Any:
        raise ZeroDivisionError("floor")


class _Odd(Line):
    def __init__(self, observes: Any = None, acts: Any = None) -> None:
        super().__init__()
        self.observation_space = observes or self.observation_space
        self.action_space = acts or self.action_space


_shared = Line()


@pytest.mark.parametrize(
    ("makers", "options", "message"),
    [
        ({"a": _fails}, {}, "cannot make the environment 'a': RuntimeError: no licence"),
        ({"a": dict}, {}, "'a'.*dict"),
        ({"a": _shared}, {}, "'a' is a Line: give a function"),
        ({"a": _Falls}, {}, "'a' fails at its first step: ZeroDivisionError: floor"),
        ({"a": Line}, {"horizon": None}, "a has no time limit of its own: set horizon"),
        ({"a": Line}, {"horizon": 0}, "horizon=0"),
        ({"a": Line}, {"tasks": ["b"]}, "no environment is given for task 'b': there are a"),
        ({"a": Line}, {"tasks": ["a", "a"]}, "named twice"),
        ({"a": Line, "b": Choices}, {}, r"cannot be mixed.*a \(Box\), b \(Discrete\)"),
        ({"a": lambda: _Odd(Discrete(3))}, {}, "a observes.*wrap it"),
        ({"a": lambda: _Odd(None, MultiDiscrete([2, 2]))}, {}, "a acts in.*wrap it"),
    ],
)
def test_errors_are_one_line(makers: dict[str, Callable[[], Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        suite(makers, **options)
    assert "\n" not in str(caught.value)


def test_an_object_is_not_stepped_by_two_slots() -> None:
    made = suite({"a": lambda: _shared})
    with pytest.raises(UserError, match="make a new one in every call"):
        made.make_engine(1, 0)
