"""The LunarLander suite: variants differ as they say, success is a return of 200."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from varshare_rl.envs.lunarlander import LunarLanderConfig, LunarLanderSuite
from varshare_rl.envs.slots import EngineSpec
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import UserError


def test_suite() -> None:
    made = LunarLanderSuite(LunarLanderConfig())
    assert isinstance(made, Suite)
    assert made.task_names == ("standard", "windy", "heavy")
    assert made.action_space == Discrete(4)
    assert made.observation_space.shape == (8,)
    assert made.horizon == 1000
    assert made.provenance["success"] == "return >= 200"
    assert LunarLanderSuite(LunarLanderConfig(continuous=True)).action_space == Box(-1, 1, (2,), np.float32)


def test_heavy_falls_faster_and_wind_pushes() -> None:
    """All variants start alike at the same seed but for the pull of the first steps."""
    made = LunarLanderSuite(LunarLanderConfig(workers=1))
    falls, drifts = [], []
    for seed in range(4):
        engine = made.make_engine(1, seed)
        first = engine.reset()[:, 0]
        for _ in range(20):
            last = engine.step(np.zeros((3, 1), np.int64)).next_obs[:, 0]
        falls.append(last[:, 3] - first[:, 3])
        drifts.append(last[:, 2] - first[:, 2])
    fall, drift = np.mean(falls, axis=0), np.abs(drifts).mean(axis=0)
    np.testing.assert_allclose(fall[2] / fall[0], 1.19, atol=0.03)  # gravity 11.9 against 10
    assert drift[1] > 10 * max(drift[0], drift[2])


def test_success_is_a_return_of_200_on_the_last_step() -> None:
    """Gymnasium's own heuristic pilot lands; doing nothing crashes."""
    engine = LunarLanderSuite(LunarLanderConfig(tasks=["standard"], workers=1)).make_engine(6, 0)
    # Imported here: Box2D's first import must be the suite's, which keeps it from ending the process.
    from gymnasium.envs.box2d import lunar_lander

    pilot: Any = lunar_lander.heuristic
    env = gymnasium.make("LunarLander-v3").unwrapped
    obs = engine.reset()
    returns, outcomes = np.zeros(6), []
    for _ in range(1000):
        actions = np.array([[pilot(env, o) if e < 4 else 0 for e, o in enumerate(obs[0])]])
        step = engine.step(actions)
        obs = step.obs
        returns += step.reward[0]
        done = (step.terminated | step.truncated)[0]
        assert not step.success[0, ~done].any()
        for e in np.flatnonzero(done):
            outcomes.append((returns[e], bool(step.success[0, e])))
            returns[e] = 0
        if len(outcomes) > 40:
            break
    assert all(success == (value >= 200) for value, success in outcomes)
    assert {success for _, success in outcomes} == {False, True}


def test_an_episode_is_the_one_gymnasium_plays() -> None:
    engine = LunarLanderSuite(LunarLanderConfig(tasks=["windy"], workers=1)).make_engine(1, 5)
    seed = EngineSpec(1, 1, 8, (), "int64", seed=5, evaluation=False).episode(0, 0).integer_seed()
    env = gymnasium.make("LunarLander-v3", enable_wind=True, wind_power=15.0, turbulence_power=1.5)
    np.testing.assert_array_equal(engine.reset()[0, 0], env.reset(seed=seed)[0])
    for k in range(30):
        step = engine.step(np.full((1, 1), k % 4))
        obs, reward, *_ = env.step(k % 4)
        np.testing.assert_array_equal(step.next_obs[0, 0], obs)
        assert step.reward[0, 0] == np.float32(reward)


@pytest.mark.parametrize("tasks", [["windy", "stormy"], [], ["heavy", "heavy"]])
def test_unknown_missing_or_repeated_tasks_are_errors(tasks: list[str]) -> None:
    with pytest.raises(UserError, match=r"choose from standard, windy, heavy|list one or more, each once"):
        LunarLanderSuite(LunarLanderConfig(tasks=tasks))
