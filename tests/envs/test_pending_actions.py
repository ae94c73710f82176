"""Steps begun in turns: both engines hold to one contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from varshare_rl.envs.gymnasium_suite import GymnasiumConfig, GymnasiumSuite
from varshare_rl.envs.pointmass import PointMassConfig, PointMassSuite
from varshare_rl.envs.suite import Suite, VectorEngine

ENVS = 3
SUITES: dict[str, Callable[[], Suite]] = {
    "batched": lambda: PointMassSuite(PointMassConfig(tasks=["normal_left", "flipped_up"])),
    "slots": lambda: GymnasiumSuite(GymnasiumConfig(ids=["Pendulum-v1", "Pendulum-v1"], workers=1)),
    "workers": lambda: GymnasiumSuite(GymnasiumConfig(ids=["Pendulum-v1", "Pendulum-v1"], workers=2)),
}


@pytest.fixture(params=SUITES)
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[VectorEngine, VectorEngine]]:
    suite = SUITES[request.param]()
    pair = (suite.make_engine(ENVS, seed=3), suite.make_engine(ENVS, seed=3))
    for engine in pair:
        engine.reset()
    yield pair
    for engine in pair:
        engine.close()


def actions(engine: VectorEngine, suite_width: int, step: int) -> np.ndarray:
    shape = (engine.num_tasks, ENVS, suite_width)
    return np.random.default_rng(step).uniform(-1, 1, shape).astype(np.float32)


def width(engine: VectorEngine) -> int:
    return 2 if type(engine).__name__ == "BatchedEngine" else 1


def test_turns_make_the_same_step(engines: tuple[VectorEngine, VectorEngine]) -> None:
    whole, turns = engines
    for k in range(5):
        given = actions(whole, width(whole), k)
        for envs in (slice(1, None), slice(0, 1)):
            turns.begin(given[:, envs], envs)
        one, two = whole.step(given), turns.finish()
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, getattr(two, name), err_msg=name)


def test_what_breaks_the_contract_is_an_error(engines: tuple[VectorEngine, VectorEngine]) -> None:
    whole, turns = engines
    given = actions(whole, width(whole), 0)
    with pytest.raises(RuntimeError, match=r"environments \[0, 1, 2\] were given an action"):
        turns.finish()
    with pytest.raises(ValueError, match="this engine takes"):
        turns.begin(given[:, :2], slice(None))
    turns.begin(given[:, :2], slice(0, 2))
    with pytest.raises(RuntimeError, match="second action"):
        turns.begin(given[:, 1:], slice(1, 3))
    with pytest.raises(RuntimeError, match=r"environments \[2\]"):
        turns.finish()
    turns.begin(given[:, 2:], slice(2, 3))
    np.testing.assert_array_equal(turns.finish().reward, whole.step(given).reward)


def test_a_reset_forgets_a_step_that_was_begun(engines: tuple[VectorEngine, VectorEngine]) -> None:
    whole, turns = engines
    given = actions(whole, width(whole), 1)
    turns.begin(given[:, :1], slice(0, 1))
    turns.reset()
    np.testing.assert_array_equal(turns.step(given).obs, whole.step(given).obs)
