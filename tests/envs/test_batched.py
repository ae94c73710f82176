"""Promises of both numpy suites, through the engine they share."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from varshare_rl.envs.batched import philox
from varshare_rl.envs.cartpole import CartPoleConfig, CartPoleSuite
from varshare_rl.envs.pointmass import PointMassConfig, PointMassSuite
from varshare_rl.envs.suite import State, Step, Suite, VectorEngine
from varshare_rl.errors import UserError

SUITES = ["pointmass", "cartpole"]
STEPS = 100  # several episodes of either suite under random actions
RESULTS = ("obs", "next_obs", "reward", "terminated", "truncated", "success", "task_id")


def make_suite(name: str) -> Suite:
    if name == "pointmass":
        return PointMassSuite(PointMassConfig(horizon=15))
    return CartPoleSuite(CartPoleConfig(horizon=30))


def random_actions(suite: Suite, envs: int, steps: int = STEPS) -> list[npt.NDArray[Any]]:
    """Actions ``[T, E, ...]`` whose first columns do not depend on the number of environments."""
    tasks = len(suite.task_names)
    rng = np.random.default_rng(7)
    if suite.name == "pointmass":
        pushes = rng.uniform(-1, 1, (steps, tasks, 8, 2)).astype(np.float32)
        return [push[:, :envs] for push in pushes]
    choices = rng.integers(0, 2, (steps, tasks, 8))
    return [choice[:, :envs] for choice in choices]


def drive(engine: VectorEngine, actions: list[npt.NDArray[Any]]) -> list[Step]:
    return [engine.step(action) for action in actions]


def assert_same_steps(first: list[Step], second: list[Step]) -> None:
    for one, other in zip(first, second, strict=True):
        for name in RESULTS:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox(np.array([counter, counter], dtype=np.uint64), key)
    assert [tuple(int(word) for word in row) for row in words] == [expected, expected]


@pytest.mark.parametrize("name", SUITES)
def test_shapes_types_and_bounds_are_those_of_the_protocol(name: str) -> None:
    suite = make_suite(name)
    assert isinstance(suite, Suite)
    tasks, envs = len(suite.task_names), 3
    engine = suite.make_engine(envs, seed=0)
    assert (engine.num_tasks, engine.envs_per_task) == (tasks, envs)
    assert engine.reset().shape == (tasks, envs, *suite.observation_space.shape)
    for step in drive(engine, random_actions(suite, envs)):
        for array in (step.obs, step.next_obs):
            assert array.dtype == np.float32
            assert array.shape == (tasks, envs, *suite.observation_space.shape)
            assert (array >= suite.observation_space.low).all()
            assert (array <= suite.observation_space.high).all()
        assert step.reward.dtype == np.float32
        assert step.reward.shape == (tasks, envs)
        assert not (step.terminated & step.truncated).any()
        np.testing.assert_array_equal(step.task_id, np.arange(tasks)[:, None].repeat(envs, axis=1))


@pytest.mark.parametrize("name", SUITES)
def test_an_episode_end_gives_the_true_successor_and_a_fresh_start(name: str) -> None:
    suite = make_suite(name)
    engine = suite.make_engine(4, seed=3)
    obs = engine.reset()
    elapsed = np.zeros(obs.shape[:2], dtype=int)
    ends = 0
    for step in drive(engine, random_actions(suite, 4)):
        elapsed += 1
        done = step.terminated | step.truncated
        np.testing.assert_array_equal(step.truncated, (elapsed == suite.horizon) & ~step.terminated)
        np.testing.assert_array_equal(step.obs[~done], step.next_obs[~done])
        assert (np.abs(step.obs[done]) <= 0.1).all()  # both suites start within 0.1 of the origin
        if done.any():
            assert not (step.obs[done] == step.next_obs[done]).all(axis=-1).any()
        elapsed[done] = 0
        ends += int(done.sum())
    assert ends > 4 * len(suite.task_names)


@pytest.mark.parametrize("name", SUITES)
def test_reset_is_repeatable_and_seeds_differ(name: str) -> None:
    suite = make_suite(name)
    engine = suite.make_engine(3, seed=11)
    actions = random_actions(suite, 3)
    start, first = engine.reset(), drive(engine, actions)
    np.testing.assert_array_equal(engine.reset(), start)
    assert_same_steps(first, drive(engine, actions))
    starts = [start.copy()]
    for seed, evaluation in [(12, False), (11 + 2**32, False), (11, True)]:
        starts.append(suite.make_engine(3, seed, evaluation).reset())
    for position, one in enumerate(starts):
        for other in starts[:position]:
            assert not (one == other).all(axis=-1).any()


@pytest.mark.parametrize("name", SUITES)
def test_every_episode_of_a_slot_and_every_slot_starts_elsewhere(name: str) -> None:
    suite = make_suite(name)
    engine = suite.make_engine(4, seed=0)
    starts = [engine.reset()[0]]
    for step in drive(engine, random_actions(suite, 4)):
        starts.append(step.obs[0][step.terminated[0] | step.truncated[0]])
    rows = np.concatenate(starts)
    assert len(rows) > 20
    assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize("name", SUITES)
def test_a_slot_does_not_depend_on_how_many_there_are(name: str) -> None:
    suite = make_suite(name)
    small, large = suite.make_engine(2, seed=5), suite.make_engine(8, seed=5)
    np.testing.assert_array_equal(small.reset(), large.reset()[:, :2])
    for one, other in zip(
        drive(small, random_actions(suite, 2)), drive(large, random_actions(suite, 8)), strict=True
    ):
        for result in RESULTS:
            np.testing.assert_array_equal(getattr(one, result), getattr(other, result)[:, :2])


@pytest.mark.parametrize("name", SUITES)
def test_evaluation_visits_the_same_episodes_with_any_number_of_environments(name: str) -> None:
    suite = make_suite(name)

    def starts(envs: int, rounds: int) -> npt.NDArray[np.float32]:
        """First observations of episodes 0 to ``rounds * envs - 1`` of task 0, ``[rounds * envs, F]``."""
        engine = suite.make_engine(envs, seed=5, evaluation=True)
        found = np.zeros((rounds * envs, *suite.observation_space.shape), dtype=np.float32)
        episode = np.zeros(envs, dtype=int)
        found[np.arange(envs)] = engine.reset()[0]
        # Fixed pushes end every episode before its horizon or at it, so all rounds are reached.
        action = np.ones_like(random_actions(suite, envs, 1)[0])
        for _ in range(rounds * suite.horizon):
            step = engine.step(action)
            for slot in np.flatnonzero(step.terminated[0] | step.truncated[0]):
                episode[slot] += 1
                if episode[slot] < rounds:
                    found[episode[slot] * envs + slot] = step.obs[0, slot]
        return found

    np.testing.assert_array_equal(starts(4, 2), starts(2, 4))


def through_json(state: State) -> State:
    """A state after its arrays were written as JSON lists."""
    listed = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in state.items()}
    restored: State = json.loads(json.dumps(listed))
    return restored


@pytest.mark.parametrize("as_json", [False, True], ids=["arrays", "json"])
@pytest.mark.parametrize("name", SUITES)
def test_a_state_goes_on_bit_for_bit_in_a_fresh_engine(name: str, as_json: bool) -> None:
    suite = make_suite(name)
    actions = random_actions(suite, 4)
    engine = suite.make_engine(4, seed=9)
    before = drive(engine, actions[:37])
    state = engine.state()
    after = drive(engine, actions[37:])
    fresh = suite.make_engine(4, seed=9)
    obs = fresh.load_state(through_json(state) if as_json else state)
    np.testing.assert_array_equal(obs, before[-1].obs)
    assert_same_steps(after, drive(fresh, actions[37:]))


@pytest.mark.parametrize("name", SUITES)
def test_returned_arrays_and_states_are_the_callers_to_keep(name: str) -> None:
    suite = make_suite(name)
    actions = random_actions(suite, 2)
    untouched = drive(suite.make_engine(2, seed=1), actions)
    engine = suite.make_engine(2, seed=1)
    engine.reset()[:] = 99.0
    for action, expected in zip(actions, untouched, strict=True):
        state = engine.state()
        step = engine.step(action)
        assert_same_steps([step], [expected])
        for result in RESULTS:
            getattr(step, result)[:] = 1
        for leaf in state.values():
            if isinstance(leaf, np.ndarray):
                leaf[:] = 1


@pytest.mark.parametrize("name", SUITES)
def test_impossible_requests_are_one_line_errors(name: str) -> None:
    suite = make_suite(name)
    with pytest.raises(UserError, match="envs_per_task=0: at least 1"):
        suite.make_engine(0, seed=0)
    with pytest.raises(UserError, match="seed=-1"):
        suite.make_engine(1, seed=-1)
    engine = suite.make_engine(2, seed=0)
    with pytest.raises(UserError, match="actions have shape"):
        engine.step(random_actions(suite, 3)[0])
    with pytest.raises(UserError, match="has envs_per_task 3, this engine 2"):
        engine.load_state(suite.make_engine(3, seed=0).state())
    with pytest.raises(UserError, match="has seed 1, this engine 0"):
        engine.load_state(suite.make_engine(2, seed=1).state())
