"""Cart and pole: the same as gymnasium's where it is the same task, and solvable in every variant."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from varshare_rl.envs.cartpole import TASK_NAMES, CartPoleConfig, CartPoleSuite
from varshare_rl.errors import UserError


def test_the_standard_task_takes_the_steps_of_cartpole_v1() -> None:
    suite = CartPoleSuite(CartPoleConfig(tasks=["standard"]))
    engine = suite.make_engine(1, seed=0)
    engine.reset()
    reference: Any = gymnasium.make("CartPole-v1").unwrapped
    rng = np.random.default_rng(0)
    episodes = 0
    reference.reset(seed=0)
    reference.state = engine.state()["states"][0, 0].copy()
    for _ in range(1500):
        action = int(rng.integers(2))
        obs, reward, terminated, _, _ = reference.step(action)
        step = engine.step(np.array([[action]]))
        # Equal to the bit where numpy rounds sines of arrays and of scalars alike, which it need not do.
        np.testing.assert_allclose(step.next_obs[0, 0], obs, rtol=2e-7, atol=1e-9)
        assert step.reward[0, 0] == reward
        assert step.terminated[0, 0] == terminated
        if terminated:
            episodes += 1
            reference.reset()
            reference.state = engine.state()["states"][0, 0].copy()
        else:
            np.testing.assert_allclose(engine.state()["states"][0, 0], reference.state, rtol=1e-12, atol=1e-14)
    assert episodes > 30


@pytest.mark.parametrize(
    ("task", "attributes"),
    [
        ("long", {"length": 1.0}),
        ("short", {"length": 0.25}),
        ("strong", {"force_mag": 15.0}),
        ("weak", {"force_mag": 5.0}),
        ("heavy_gravity", {"gravity": 19.6}),
    ],
)
def test_a_variant_is_cartpole_v1_with_that_attribute_changed(task: str, attributes: dict[str, float]) -> None:
    engine = CartPoleSuite(CartPoleConfig(tasks=[task])).make_engine(1, seed=1)
    reference: Any = gymnasium.make("CartPole-v1").unwrapped
    for name, value in attributes.items():
        setattr(reference, name, value)
    reference.polemass_length = reference.masspole * reference.length
    reference.reset(seed=0)
    reference.state = engine.state()["states"][0, 0].copy()
    terminated = False
    for action in [1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]:
        obs, _, terminated, _, _ = reference.step(action)
        step = engine.step(np.array([[action]]))
        np.testing.assert_allclose(step.next_obs[0, 0], obs, rtol=2e-7, atol=1e-9)
        assert step.terminated[0, 0] == terminated
        if terminated:
            break
    assert terminated


@pytest.mark.parametrize("kind", list(TASK_NAMES))
def test_every_task_can_be_balanced_to_the_end_and_says_so_there_only(kind: str) -> None:
    suite = CartPoleSuite(CartPoleConfig(variant_set=kind))
    engine = suite.make_engine(20, seed=0, evaluation=True)
    obs = engine.reset()
    for count in range(1, 501):
        # A hand-tuned linear feedback of all four components keeps every variant up.
        action = (obs @ np.array([0.5, 1.0, 10.0, 2.0]) > 0).astype(np.int64)
        step = engine.step(action)
        obs = step.obs
        assert (step.reward == 1.0).all()
        assert not step.terminated.any()
        assert step.truncated.all() == (count == 500)
        assert step.success.all() == (count == 500)
        assert step.success.any() == (count == 500)


def test_a_fall_is_a_termination_without_success_even_at_the_horizon() -> None:
    pushes = np.ones((1, 1), dtype=np.int64)
    free = CartPoleSuite(CartPoleConfig(tasks=["standard"])).make_engine(1, seed=0)
    steps = 1
    while not (step := free.step(pushes)).terminated.any():
        steps += 1
    assert not step.success.any()
    cut = CartPoleSuite(CartPoleConfig(tasks=["standard"], horizon=steps)).make_engine(1, seed=0)
    for _ in range(steps):
        step = cut.step(pushes)
    assert step.terminated.all()
    assert not step.truncated.any()
    assert not step.success.any()


def test_identical_tasks_move_identically_from_different_starts() -> None:
    suite = CartPoleSuite(CartPoleConfig(variant_set="identical"))
    assert suite.task_names == ("identical_0", "identical_1", "identical_2", "identical_3")
    engine = suite.make_engine(1, seed=0)
    starts = engine.reset()
    assert len(np.unique(starts[:, 0, 0])) == 4
    state = engine.state()
    state["states"][:] = state["states"][0]
    engine.load_state(state)
    step = engine.step(np.ones((4, 1), dtype=np.int64))
    assert (step.next_obs == step.next_obs[0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CartPoleConfig(variant_set="all"), "variant_set 'all': choose from variants, identical"),
        (CartPoleConfig(tasks=["identical_0"]), "unknown cartpole task 'identical_0': choose from standard"),
        (CartPoleConfig(horizon=-1), "horizon=-1: at least 1"),
    ],
)
def test_impossible_options_are_one_line_errors(options: CartPoleConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        CartPoleSuite(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("action", [2, -1])
def test_an_unknown_action_is_an_error(action: int) -> None:
    engine = CartPoleSuite(CartPoleConfig()).make_engine(2, seed=0)
    with pytest.raises(UserError, match=r"neither 0 \(left\) nor 1 \(right\)"):
        engine.step(np.full((6, 2), action))


def test_conditions_name_the_set() -> None:
    suite = CartPoleSuite(CartPoleConfig(variant_set="identical", horizon=100))
    assert suite.provenance["variant_set"] == "identical"
    assert suite.provenance["horizon"] == 100
