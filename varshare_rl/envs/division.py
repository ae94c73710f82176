"""Which worker steps which slots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

_NEXT_TO_NOTHING = 1.02


def divide(task_costs: Sequence[float], envs_per_task: int, workers: int) -> list[list[int]]:
    """Give every slot to a worker so that the one with the most to do has little more than the others.

    Whole tasks, where that costs next to nothing: what a worker compiles or loads for a task is then there once.
    Otherwise the slots are cut into ranges, in which a few tasks are divided.

    Args:
        task_costs: what one step of each task costs, in any unit; ``[T]``.
        envs_per_task: ``E``. Slot ``task * E + e`` is environment ``e`` of a task.
        workers: 1 to ``T * E``.

    Returns:
        The slots of each worker, ascending; none is empty.
    """
    costs = [cost for cost in task_costs for _ in range(envs_per_task)]
    cut = _cut(costs, envs_per_task, workers)
    if workers > len(task_costs):
        return cut
    dealt = _deal(task_costs, envs_per_task, workers)
    most_dealt, most_cut = (max(sum(costs[i] for i in part) for part in plan) for plan in (dealt, cut))
    return dealt if most_dealt <= _NEXT_TO_NOTHING * most_cut else cut


def _deal(task_costs: Sequence[float], envs_per_task: int, workers: int) -> list[list[int]]:
    """Whole tasks, the dearest first, each to the worker that has the least to do so far.

    Graham, "Bounds on multiprocessing timing anomalies" (1969).
    """
    loads, parts = [0.0] * workers, [list[int]() for _ in range(workers)]
    for task in sorted(range(len(task_costs)), key=lambda task: -task_costs[task]):
        worker = min(range(workers), key=lambda k: (loads[k], len(parts[k])))
        loads[worker] += task_costs[task]
        parts[worker] += range(task * envs_per_task, (task + 1) * envs_per_task)
    return [sorted(part) for part in parts]


def _cut(costs: Sequence[float], envs_per_task: int, workers: int) -> list[list[int]]:
    """Ranges of about the same cost. A divided task gives each worker some of its first and of its second half."""
    half = envs_per_task // 2
    order = sorted(
        range(len(costs)),
        key=lambda slot: (slot // envs_per_task, slot % envs_per_task % max(half, 1), slot % envs_per_task),
    )
    ends = list(accumulate((costs[slot] for slot in order), initial=0.0))
    edges = [0]
    for k in range(1, workers):
        wanted = ends[-1] * k / workers
        nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - wanted))
        edges.append(min(max(nearest, edges[-1] + 1), len(costs) - (workers - k)))
    return [sorted(order[start:stop]) for start, stop in pairwise([*edges, len(costs)])]
