"""The engine of one environment per slot: layout, autoreset, seeds, workers, state, failures."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Discrete
from walk import WalkFactory, actions, assert_same, make, trace

from varshare_rl.envs.division import choose_workers, cores, physical_cores
from varshare_rl.envs.engine import SlotEngine
from varshare_rl.envs.slots import EngineSpec
from varshare_rl.errors import UserError


def test_shapes_types_and_task_ids() -> None:
    engine = make()
    obs = engine.reset()
    step = engine.step(actions(0))
    assert obs.shape == step.obs.shape == step.next_obs.shape == (3, 2, 3)
    assert obs.dtype == step.obs.dtype == step.reward.dtype == np.float32
    assert step.terminated.dtype == step.truncated.dtype == step.success.dtype == np.bool_
    np.testing.assert_array_equal(step.task_id, [[0, 0], [1, 1], [2, 2]])
    assert step.task_id.dtype == np.int64


def test_autoreset_gives_true_last_observation_and_new_first_one() -> None:
    engine = make()
    engine.reset()
    lengths = np.zeros((3, 2))
    for _ in range(12):
        step = engine.step(np.zeros((3, 2, 2), np.float32))
        lengths += 1
        done = step.terminated | step.truncated
        np.testing.assert_array_equal(step.next_obs[..., 1], lengths)  # counts the steps of the old episode
        np.testing.assert_array_equal(step.obs[..., 1], np.where(done, 0, lengths))
        np.testing.assert_array_equal(step.truncated, (lengths == [[3], [4], [5]]) & ~step.terminated)
        lengths[done] = 0


def test_terminated_wins_over_truncated() -> None:
    engine = make()
    engine.reset()
    for size in (0, 0, 9):
        step = engine.step(np.full((3, 2, 2), size, np.float32))
    assert step.terminated[0].all()  # task 0 is past 5 exactly at its time limit
    assert step.success[0].all()
    assert not step.truncated[0].any()


def test_arrays_belong_to_the_caller() -> None:
    engine = make()
    first = engine.reset()
    kept = first.copy()
    step = engine.step(actions(0))
    obs = step.obs.copy()
    step.obs[:] = 99
    engine.step(actions(1))
    np.testing.assert_array_equal(first, kept)
    replayed = make()
    replayed.reset()
    np.testing.assert_array_equal(replayed.step(actions(0)).obs, obs)


@pytest.mark.parametrize("evaluation", [False, True])
def test_results_do_not_depend_on_the_number_of_workers(evaluation: bool) -> None:
    traces = []
    for workers in (1, 2, 3):
        engine = make(workers, evaluation)
        assert engine.workers == workers
        traces.append([engine.reset(), *trace(engine, 0, 20), engine.reset(), *trace(engine, 0, 5)])
        engine.close()
    assert_same(traces[0], traces[1])
    assert_same(traces[0], traces[2])
    assert_same(traces[0][-36:-1], traces[0][: 5 * 7])  # a reset restarts at episode 0


def test_episodes_differ_between_slots_tasks_seeds_and_modes() -> None:
    firsts = [make(seed=s, evaluation=e).reset()[..., 0] for s in (0, 1) for e in (False, True)]
    assert len(np.unique(np.array(firsts))) == 4 * 6
    engine = make()
    before = engine.reset()
    for k in range(5):
        after = engine.step(actions(k)).obs
    assert not np.isin(after[..., 0], before[..., 0]).any()


def test_evaluation_sweeps_and_does_not_depend_on_envs_per_task() -> None:
    seen = {}
    for envs in (1, 2):
        engine = make(evaluation=True, envs=envs)
        obs = engine.reset()
        begun = [obs[0]]
        for _ in range(3 * (4 // envs) - 1):
            step = engine.step(np.zeros((3, envs, 2), np.float32))
            if step.truncated[0].any():
                begun.append(step.obs[0])
        seen[envs] = np.concatenate(begun)
        np.testing.assert_array_equal(seen[envs][:, 2], np.arange(4))
    np.testing.assert_array_equal(seen[1], seen[2])


def test_training_slot_does_not_depend_on_other_slots() -> None:
    small, large = make(envs=1), make(envs=3)
    np.testing.assert_array_equal(small.reset()[:, 0], large.reset()[:, 0])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_state_continues_bit_for_bit(before: int, after: int) -> None:
    engine = make(before)
    engine.reset()
    trace(engine, 0, 9)
    state = engine.state()
    expected = trace(engine, 9, 20)
    engine.close()
    fresh = make(after)
    obs = fresh.load_state(state)
    np.testing.assert_array_equal(obs.reshape(6, 3), [slot["obs"] for slot in state["slots"]])
    assert_same(trace(fresh, 9, 20), expected)
    fresh.close()


def test_state_holds_only_plain_leaves() -> None:
    engine = make()
    engine.reset()
    trace(engine, 0, 3)

    def check(node: Any) -> None:
        if isinstance(node, dict):
            assert all(isinstance(key, str) for key in node)
            for value in node.values():
                check(value)
        elif isinstance(node, list):
            for value in node:
                check(value)
        else:
            assert node is None or type(node) in (np.ndarray, int, float, str, bool)

    check(engine.state())


@pytest.mark.parametrize("workers", [1, 2])
def test_irreproducible_environment_is_refused_when_loaded(workers: int) -> None:
    engine = make(workers, noise=False)
    engine.reset()
    state = engine.state()
    with pytest.raises(UserError, match="not deterministic"):
        engine.load_state(state)
    engine.close()


def test_state_of_other_settings_is_refused() -> None:
    engine = make()
    engine.reset()
    with pytest.raises(UserError, match="seed 7, this engine 8"):
        make(seed=8).load_state(engine.state())


def test_wrong_use_is_an_error() -> None:
    engine = make()
    with pytest.raises(RuntimeError, match="before reset"):
        engine.step(actions(0))
    engine.reset()
    with pytest.raises(ValueError, match=r"\(3, 2\); this engine takes \(3, 2, 2\)"):
        engine.step(np.zeros((3, 2), np.float32))
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.reset()
    for envs, seed, workers in ((0, 0, 1), (1, -1, 1), (1, 0, -1)):
        with pytest.raises(UserError, match="is not possible"):
            make(workers, envs=envs, seed=seed)


def test_discrete_actions_reach_the_environment() -> None:
    engine = SlotEngine(
        WalkFactory(),
        step_seconds=[1.0, 1.0],
        envs_per_task=1,
        observation_size=3,
        action_space=Discrete(4),
        seed=0,
        evaluation=False,
        workers=1,
    )
    obs = engine.reset()
    step = engine.step(np.array([[3], [0]]))
    np.testing.assert_allclose((step.next_obs - obs)[:, 0, 0], [3, 0], atol=0.1)


def test_number_of_workers() -> None:
    count = physical_cores()
    assert 1 <= count <= len(cores()) <= (os.cpu_count() or 1)
    assert choose_workers(0, 2, [1.0] * 5) == min(count, 10)
    assert choose_workers(0, 2, [1e-5] * 5) == 1  # nothing to share out
    assert choose_workers(0, 1, [1e-5, 3e-4]) == 1
    assert choose_workers(4, 1, [1.0, 1.0]) == 2  # never more than slots
    assert choose_workers(3, 1, [1e-9] * 10) == 3  # as asked


def test_episode_seeds() -> None:
    spec = EngineSpec(2, 3, 1, (), "int64", seed=5, evaluation=False)
    episode = spec.episode(slot=4, index=9)
    assert episode.sweep is None
    assert episode.seed.entropy == (5, 0)
    assert episode.seed.spawn_key == (1, 1, 9)
    swept = replace(spec, evaluation=True).episode(slot=4, index=9)
    assert swept.sweep == 9 * 3 + 1
    assert swept.seed.entropy == (5, 1)
    assert swept.seed.spawn_key == (1, 28)
    assert episode.integer_seed() != swept.integer_seed()
