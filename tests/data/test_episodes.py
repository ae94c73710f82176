from __future__ import annotations

import numpy as np
import pytest

from varshare_rl.data.episodes import EpisodeStatistics


def feed(statistics: EpisodeStatistics, steps: int, seed: int = 0) -> list[list[tuple[float, float, int]]]:
    """Random steps; returns the finished episodes of each task counted naively."""
    generator = np.random.default_rng(seed)
    tasks, envs = statistics.running_return.shape
    slots: list[list[list[tuple[float, bool]]]] = [[[] for _ in range(envs)] for _ in range(tasks)]
    finished: list[list[tuple[float, float, int]]] = [[] for _ in range(tasks)]
    for _ in range(steps):
        reward = generator.normal(size=(tasks, envs)).astype(np.float32)
        success, done = generator.random((2, tasks, envs)) < 0.2
        statistics.add(reward, success, done)
        for task in range(tasks):
            for env in range(envs):
                slot = slots[task][env]
                slot.append((float(reward[task, env]), bool(success[task, env])))
                if done[task, env]:
                    total, any_success = sum(r for r, _ in slot), float(any(s for _, s in slot))
                    finished[task].append((total, any_success, len(slot)))
                    slot.clear()
    return finished


def test_equals_a_naive_count_over_the_window() -> None:
    statistics = EpisodeStatistics(("a", "b"), 3, window=7)
    finished = feed(statistics, 60)
    metrics = statistics.metrics(with_success=True)
    for name, episodes in zip(("a", "b"), finished, strict=True):
        assert len(episodes) > 7
        returns, successes, lengths = (np.mean(x) for x in zip(*episodes[-7:], strict=True))
        assert metrics[f"train/{name}/return"] == pytest.approx(returns, rel=1e-6)
        assert metrics[f"train/{name}/success"] == pytest.approx(successes)
        assert metrics[f"train/{name}/episode_steps"] == pytest.approx(lengths)
    for kind in ("return", "success", "episode_steps"):
        mean = (metrics[f"train/a/{kind}"] + metrics[f"train/b/{kind}"]) / 2
        assert metrics[f"train/mean_{kind}"] == pytest.approx(mean)


def test_says_nothing_of_tasks_without_a_finished_episode() -> None:
    statistics = EpisodeStatistics(("a", "b"), 1)
    assert statistics.metrics(True) == {}
    one = np.ones((2, 1), dtype=np.float32)
    no = np.zeros((2, 1), dtype=bool)
    statistics.add(one, no, no)
    assert statistics.metrics(True) == {}
    statistics.add(one, no, np.array([[False], [True]]))
    assert statistics.metrics(True) == {
        "train/b/return": 2.0, "train/b/success": 0.0, "train/b/episode_steps": 2.0,
        "train/mean_return": 2.0, "train/mean_success": 0.0, "train/mean_episode_steps": 2.0,
    }  # fmt: skip


def test_without_success_there_is_no_such_metric() -> None:
    statistics = EpisodeStatistics(("a",), 1)
    feed(statistics, 20)
    metrics = statistics.metrics(with_success=False)
    assert metrics.keys() == {
        "train/a/return", "train/a/episode_steps", "train/mean_return", "train/mean_episode_steps"
    }  # fmt: skip


def test_first_episodes_that_are_cut_do_not_count() -> None:
    """Of all environments but the last, also where a run goes on in the middle of one."""
    one = EpisodeStatistics(("a", "b"), 3, staggered=True)
    reward, no = np.ones((2, 3), np.float32), np.zeros((2, 3), dtype=bool)
    first, rest = no.copy(), no.copy()
    first[:, 0], rest[:, 1:] = True, True
    one.add(reward, ~no, first)
    assert one.metrics(True) == {}
    other = EpisodeStatistics(("a", "b"), 3, staggered=True)
    other.load_state({name: value.copy() for name, value in one.state().items()})
    for statistics in (one, other):
        statistics.add(reward, no, no)
        statistics.add(reward, no, rest)  # the last one is whole
        assert statistics.lengths == [[3.0], [3.0]]
        statistics.add(reward, no, first)
        assert statistics.lengths == [[3.0, 3.0], [3.0, 3.0]]
        assert statistics.successes == [[1.0, 0.0], [1.0, 0.0]]


def test_state_round_trip_in_the_middle_of_episodes() -> None:
    one, other = (EpisodeStatistics(("a", "b"), 3, window=5) for _ in range(2))
    feed(one, 17)
    assert one.running_steps.any()
    state = one.state()
    other.load_state({name: value.copy() for name, value in state.items()})
    for statistics in (one, other):
        feed(statistics, 30, seed=1)
    assert one.metrics(True) == other.metrics(True)
    np.testing.assert_array_equal(one.running_return, other.running_return)
