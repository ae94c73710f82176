"""Slots and the workers that step them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from varshare_rl.envs.division import divide
from varshare_rl.envs.metaworld import BENCHMARKS, STEP_MICROSECONDS


def loads(costs: list[float], envs: int, plan: list[list[int]]) -> list[float]:
    return [sum(costs[slot // envs] for slot in part) for part in plan]


CASES = [
    (tasks, envs, workers)
    for tasks, envs, workers in product((1, 2, 3, 10, 50), (1, 2, 5), (1, 2, 3, 8))
    if workers <= tasks * envs
]


@pytest.mark.parametrize(("tasks", "envs", "workers"), CASES)
def test_every_slot_has_one_worker_and_none_is_idle(tasks: int, envs: int, workers: int) -> None:
    costs = np.random.default_rng(tasks).uniform(60, 160, tasks).tolist()
    plan = divide(costs, envs, workers)
    assert len(plan) == workers
    assert sorted(slot for part in plan for slot in part) == list(range(tasks * envs))
    assert all(part and part == sorted(part) for part in plan)
    # No plan can be better than an even one or the dearest slot; none here is worse by more than a slot.
    assert max(loads(costs, envs, plan)) <= sum(costs) * envs / workers + max(costs)


def test_extreme_costs_leave_nobody_idle() -> None:
    for costs in ([1.0, 1.0, 1000.0], [1000.0, 1.0, 1.0], [0.0, 0.0, 0.0]):
        for workers in (2, 3, 5):
            assert all(divide(costs, 2, workers))


def test_whole_tasks_where_that_is_even() -> None:
    for part in divide([100.0] * 10, 4, 2):
        assert len(part) == 20
        assert {part.count(slot) for slot in part} == {1}
        assert len({slot // 4 for slot in part}) == 5


def test_few_tasks_are_divided_by_halves() -> None:
    """A worker has some of the first and of the second half of its environments, which may step in turns."""
    assert divide([1.0], 4, 2) == [[0, 2], [1, 3]]
    assert loads([1.0] * 3, 4, divide([1.0] * 3, 4, 2)) == [6.0, 6.0]


@pytest.mark.parametrize("benchmark", ["mt10", "mt50"])
@pytest.mark.parametrize("envs", [1, 4])
def test_meta_world_is_even_over_two_workers(benchmark: str, envs: int) -> None:
    costs = [float(STEP_MICROSECONDS[name]) for name in BENCHMARKS[benchmark]]
    work = loads(costs, envs, divide(costs, envs, 2))
    assert max(work) <= 1.02 * sum(work) / 2
