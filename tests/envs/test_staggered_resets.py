"""Staggered resets: first training episodes are cut, so that environments are in different parts of theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from walk import assert_same, make, trace

from varshare_rl.data.episodes import EpisodeStatistics
from varshare_rl.envs.division import Part
from varshare_rl.envs.metaworld import MetaWorldConfig
from varshare_rl.envs.slots import EngineSpec
from varshare_rl.errors import UserError

HORIZON, ENVS = 20, 4
TASKS = ["reach-v3", "drawer-close-v3"]


def ends(evaluation: bool = False, workers: int = 1, **options: int | bool) -> list[list[int]]:
    """The steps after which each environment of the second of two tasks was truncated, in three horizons."""
    suite = MetaWorldConfig(tasks=TASKS, horizon=HORIZON, workers=workers, **options).build()  # type: ignore[arg-type]
    engine = suite.make_engine(ENVS, seed=3, evaluation=evaluation)
    engine.reset()
    found: list[list[int]] = [[] for _ in range(ENVS)]
    for k in range(1, 3 * HORIZON + 1):
        step = engine.step(np.zeros((2, ENVS, 4), np.float32))
        assert not step.terminated.any()
        for env in np.flatnonzero(step.truncated[1]):
            found[env].append(k)
    engine.close()
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_first_episodes_are_cut_and_later_ones_are_whole(workers: int) -> None:
    assert ends(workers=workers) == [
        [5, 25, 45], [10, 30, 50], [15, 35, 55], [20, 40, 60],
    ]  # fmt: skip


def test_episodes_are_whole_where_asked_and_in_evaluation() -> None:
    assert ends(staggered_resets=False) == [[20, 40, 60]] * ENVS
    assert ends(evaluation=True) == [[20, 40, 60]] * ENVS


@pytest.mark.parametrize(("staggered", "counted"), [(True, 1 + ENVS), (False, 2 * ENVS)])
def test_statistics_of_training_have_whole_episodes_alone(staggered: bool, counted: int) -> None:
    suite = MetaWorldConfig(tasks=TASKS, horizon=HORIZON, workers=1, staggered_resets=staggered).build()
    statistics = EpisodeStatistics(suite.task_names, ENVS, staggered=suite.staggered)
    engine = suite.make_engine(ENVS, seed=3)
    engine.reset()
    for _ in range(2 * HORIZON):
        step = engine.step(np.zeros((2, ENVS, 4), np.float32))
        statistics.add(step.reward, step.success, step.terminated | step.truncated)
    engine.close()
    assert statistics.lengths == [[HORIZON] * counted] * 2


@pytest.mark.parametrize("fast", [True, False])
def test_training_episodes_may_be_shorter_than_those_of_evaluation(fast: bool) -> None:
    shorter = {"training_horizon": 8, "fast": fast}
    assert ends(**shorter, staggered_resets=False) == [list(range(8, 61, 8))] * ENVS
    assert [found[:2] for found in ends(**shorter)] == [[2, 10], [4, 12], [6, 14], [8, 16]]
    assert ends(**shorter, evaluation=True) == [[20, 40, 60]] * ENVS


@pytest.mark.parametrize("options", [{"training_horizon": 21}, {"training_horizon": 10, "observe_time": True}])
def test_a_shorter_horizon_that_is_none_is_refused(options: dict[str, int | bool]) -> None:
    with pytest.raises(UserError, match=r"training_horizon=.* is not possible: it must be at most horizon, 20"):
        ends(**options)


def test_every_environment_has_a_step_of_its_own_also_in_a_part() -> None:
    spec = EngineSpec(2, 10, 1, (), "int64", seed=0, evaluation=False, stagger=500)
    assert [spec.limit(slot, 0) for slot in range(20)] == [50, 100, 150, 200, 250, 300, 350, 400, 450, 500] * 2
    part = replace(spec, envs_per_task=2, part=Part((0, 1), (3, 7), 10))
    assert [part.limit(slot, 0) for slot in range(4)] == [200, 400] * 2
    assert replace(spec, stagger=4).limit(0, 0) == 1  # more environments than steps
    assert replace(spec, stagger=0).limit(0, 0) is spec.limit(0, 1) is None
    assert replace(spec, most_steps=200).limit(0, 1) == 200
    assert replace(spec, evaluation=True, most_steps=200).limit(0, 0) is None


def test_a_first_episode_goes_on_after_a_resume() -> None:
    whole = make(envs=4, stagger=8)
    whole.reset()
    trace(whole, 0, 3)
    state, rest = whole.state(), trace(whole, 3, 12)
    resumed = make(envs=4, stagger=8)
    resumed.load_state(state)
    assert_same(rest, trace(resumed, 3, 12))
    plain = make(envs=4)
    plain.reset()
    assert not all(np.array_equal(a, b) for a, b in zip(trace(plain, 0, 12)[21:], rest, strict=True))
