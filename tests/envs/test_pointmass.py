"""The point mass: what it asks of an agent, and that an agent blind to the task fails half of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from varshare_rl.envs.pointmass import (
    ARENA,
    GOAL_RADIUS,
    TASK_NAMES,
    PointMassConfig,
    PointMassDynamics,
    PointMassSuite,
)
from varshare_rl.errors import UserError

Array = npt.NDArray[np.float64]
#: Actions ``[T, E, 2]`` from observations ``[T, E, 4]`` and the number of steps taken so far.
Policy = Callable[[Array, int], Array]

GOALS = PointMassDynamics(TASK_NAMES, horizon=40).goals[:, 0]  # [T, 2]
IDENTITY, EXCHANGE = np.eye(2), np.array([[0.0, 1.0], [1.0, 0.0]])
#: The inverse of each dynamics' action matrix, by the first part of the task's name.
INVERSES = {"normal": IDENTITY, "swapped": EXCHANGE, "flipped": -IDENTITY, "heavy": IDENTITY}


def successes(policy: Policy, envs: int = 8, seed: int = 0, evaluation: bool = True) -> npt.NDArray[np.bool_]:
    """Success of one episode in every slot, ``[T, E]``."""
    suite = PointMassSuite(PointMassConfig())
    engine = suite.make_engine(envs, seed, evaluation)
    obs = engine.reset()
    for count in range(suite.horizon):
        step = engine.step(policy(obs.astype(np.float64), count))
        obs = step.obs
        assert not step.terminated.any()
        if count < suite.horizon - 1:
            assert not step.success.any()
    assert step.truncated.all()
    return step.success


def steer(obs: Array, goal: Array) -> Array:
    """Force of a damped spring towards a goal, before any change of axes."""
    force: Array = 3.0 * (goal - obs[..., :2]) - 2.0 * obs[..., 2:]
    return force


def knows_the_task(obs: Array, count: int) -> Array:
    inverses = np.stack([INVERSES[name.split("_")[0]] for name in TASK_NAMES])
    actions: Array = np.einsum("tij,tej->tei", inverses, steer(obs, GOALS[:, None]))
    return actions


def pushes(direction: Array) -> Policy:
    return lambda obs, count: np.broadcast_to(direction, (*obs.shape[:2], 2))


def springs(goal: Array) -> Policy:
    return lambda obs, count: steer(obs, goal)


def bang_bang(goal: Array) -> Policy:
    return lambda obs, count: np.sign(steer(obs, goal))


class FindsOutTheDynamics:
    """The best a blind policy can do: tell the dynamics from the first step, then choose one goal of each."""

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.kind: npt.NDArray[np.int64] | None = None

    def __call__(self, obs: Array, count: int) -> Array:
        if count == 0:
            return np.broadcast_to(np.array([1.0, 0.0]), (*obs.shape[:2], 2))
        if count == 1:
            vx, vy = obs[..., 2], obs[..., 3]
            self.kind = np.select([vx > 0.15, vy > 0.15, vx < -0.15], [0, 1, 2], default=3)
        inverses = np.stack(list(INVERSES.values()))[self.kind]
        goals = GOALS.reshape(4, 2, 2)[self.kind, self.choice]
        actions: Array = np.einsum("teij,tej->tei", inverses, steer(obs, goals))
        return actions


def assert_blind_bound(success: npt.NDArray[np.bool_]) -> None:
    pairs = success.reshape(4, 2, -1)
    assert not pairs.all(axis=1).any()
    assert success.mean() <= 0.5


def test_an_agent_that_knows_the_task_solves_all_eight() -> None:
    for evaluation in (False, True):
        assert successes(knows_the_task, envs=50, evaluation=evaluation).all()


def test_the_two_goals_of_each_dynamics_are_disjoint_and_inside_the_arena() -> None:
    for first, second in GOALS.reshape(4, 2, 2):
        assert np.linalg.norm(first - second) > 2 * GOAL_RADIUS
    assert (np.abs(GOALS) + GOAL_RADIUS < ARENA).all()


def test_the_two_tasks_of_each_dynamics_are_indistinguishable_without_the_reward() -> None:
    engine = PointMassSuite(PointMassConfig()).make_engine(3, seed=2)
    observations = [engine.reset()]
    actions = np.random.default_rng(0).uniform(-1, 1, (90, 1, 3, 2))
    observations += [engine.step(action.repeat(8, axis=0)).obs for action in actions]
    pairs = np.stack(observations).reshape(91, 4, 2, 3, 4)
    np.testing.assert_array_equal(pairs[:, :, 0], pairs[:, :, 1])
    # The dynamics do differ once they have been acted on.
    assert not any((pairs[1, 0, 0] == pairs[1, kind, 0]).all() for kind in (1, 2, 3))


@pytest.mark.parametrize("make_policy", [pushes, springs, bang_bang])
def test_blind_controllers_towards_any_goal_stay_within_the_bound(
    make_policy: Callable[[Array], Policy],
) -> None:
    for goal in GOALS:
        assert_blind_bound(successes(make_policy(goal)))


@pytest.mark.parametrize("choice", [0, 1])
def test_the_bound_is_reached_by_a_blind_agent_that_finds_out_the_dynamics(choice: int) -> None:
    success = successes(FindsOutTheDynamics(choice))
    assert_blind_bound(success)
    assert success.mean() == 0.5


def test_a_search_for_the_best_blind_policy_stays_within_the_bound() -> None:
    """Hill climbing on the mean success of all tasks together, over small networks that see the clock too."""
    rng = np.random.default_rng(2)
    best, best_hidden, best_out = -1.0, np.zeros((6, 16)), np.zeros((16, 2))
    for _ in range(400):
        hidden = best_hidden + rng.normal(0, 0.6, best_hidden.shape)
        out = best_out + rng.normal(0, 0.6, best_out.shape)

        def policy(obs: Array, count: int, hidden: Array = hidden, out: Array = out) -> Array:
            clock = np.full((*obs.shape[:2], 1), count / 20 - 1)
            features = np.concatenate([obs, clock, np.ones_like(clock)], axis=-1)
            actions: Array = np.tanh(features @ hidden) @ out
            return actions

        success = successes(policy, envs=8)
        assert_blind_bound(success)
        if success.mean() >= best:
            best, best_hidden, best_out = float(success.mean()), hidden, out
    assert best >= 0.25  # two whole tasks: the search does learn to reach goals


def test_reward_is_minus_half_the_distance_to_the_tasks_own_goal() -> None:
    engine = PointMassSuite(PointMassConfig()).make_engine(2, seed=0)
    for action in np.random.default_rng(1).uniform(-2, 2, (45, 8, 2, 2)):
        step = engine.step(action)
        distance = np.linalg.norm(step.next_obs[..., :2] - GOALS[:, None], axis=-1)
        np.testing.assert_allclose(step.reward, -0.5 * distance, rtol=1e-5, atol=1e-6)


def test_one_step_of_each_dynamics_against_hand_worked_numbers() -> None:
    engine = PointMassSuite(PointMassConfig()).make_engine(1, seed=0)
    start = engine.reset()
    # dv = 0.1 * 2 / mass * M (1, -0.5): the axes exchanged, the sign turned, half of it for twice the mass.
    expected = np.array([[0.2, -0.1], [-0.1, 0.2], [-0.2, 0.1], [0.1, -0.05]]).repeat(2, axis=0)[:, None]
    step = engine.step(np.broadcast_to(np.array([1.0, -0.5]), (8, 1, 2)))
    np.testing.assert_allclose(step.next_obs[..., 2:], expected, atol=1e-7)
    np.testing.assert_allclose(step.next_obs[..., :2], start[..., :2] + 0.1 * expected, atol=1e-7)
    coast = engine.step(np.zeros((8, 1, 2)))
    np.testing.assert_allclose(coast.next_obs[..., 2:], 0.9 * expected, atol=1e-7)


def test_the_border_stops_the_motion_across_it_only() -> None:
    engine = PointMassSuite(PointMassConfig(tasks=["normal_right"])).make_engine(1, seed=0)
    for _ in range(30):
        step = engine.step(np.array([[[1.0, 0.3]]]))
    assert step.next_obs[0, 0, 0] == ARENA
    assert step.next_obs[0, 0, 2] == 0.0
    assert step.next_obs[0, 0, 3] > 0.3


def test_actions_beyond_the_box_count_as_its_border() -> None:
    suite = PointMassSuite(PointMassConfig())
    one, other = suite.make_engine(1, seed=0), suite.make_engine(1, seed=0)
    np.testing.assert_array_equal(one.step(np.full((8, 1, 2), 7.0)).obs, other.step(np.ones((8, 1, 2))).obs)


def test_a_subset_keeps_its_order_and_its_episodes() -> None:
    whole = PointMassSuite(PointMassConfig())
    some = PointMassSuite(PointMassConfig(tasks=["heavy_up_right", "normal_left"]))
    assert some.task_names == ("heavy_up_right", "normal_left")
    rows = [whole.task_names.index(name) for name in some.task_names]
    one, other = whole.make_engine(2, seed=6), some.make_engine(2, seed=6)
    np.testing.assert_array_equal(one.reset()[rows], other.reset())
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 2, 2))
    np.testing.assert_array_equal(one.step(actions).reward[rows], other.step(actions[rows]).reward)


def test_copies_of_a_task_at_their_own_reward_scales() -> None:
    plain = PointMassSuite(PointMassConfig(tasks=["swapped_left", "heavy_up_right"]))
    names = ["swapped_left", "swapped_left_2", "heavy_up_right_7"]
    scaled = PointMassSuite(PointMassConfig(tasks=names, reward_scales=[1, 100, 0.5]))
    assert scaled.task_names == tuple(names)
    assert scaled.provenance["reward_scales"] == "1, 100, 0.5"
    assert "reward_scales" not in plain.provenance
    one, other = plain.make_engine(2, seed=6), scaled.make_engine(2, seed=6)
    same = [0, 0, 1]
    np.testing.assert_array_equal(one.reset()[same], other.reset())
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 2, 2))
    for _ in range(45):  # into the second episode
        expected, got = one.step(actions), other.step(actions[same])
        np.testing.assert_array_equal(expected.next_obs[same], got.next_obs)
        np.testing.assert_array_equal(expected.success[same], got.success)
        factors = np.array([[1.0], [100.0], [0.5]])
        np.testing.assert_allclose(expected.reward[same] * factors, got.reward, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            PointMassConfig(tasks=["normal_left", "up"]),
            "unknown pointmass task 'up': choose from normal",
        ),
        (PointMassConfig(tasks=["normal_left", "normal_left"]), "'normal_left' is named twice"),
        (PointMassConfig(tasks=["normal_left_2", "normal_left_2"]), "'normal_left_2' is named twice"),
        (PointMassConfig(tasks=["up_2"]), "unknown pointmass task 'up_2'"),
        (PointMassConfig(reward_scales=[1.0]), "1 numbers for 8 tasks"),
        (PointMassConfig(tasks=["normal_left"], reward_scales=[float("inf")]), "reward_scales has inf"),
        (PointMassConfig(horizon=0), "horizon=0: at least 1"),
        (PointMassConfig(envs_per_task=-2), "envs_per_task=-2: at least 1"),
    ],
)
def test_impossible_options_are_one_line_errors(options: PointMassConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        PointMassSuite(options)
    assert "\n" not in str(caught.value)
