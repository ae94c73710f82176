"""The division of an engine's work: how many workers, on which cores, and the slots of each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypeVar

from varshare_rl.errors import UserError

X = TypeVar("X")

#: A worker is worth its synchronisation (about 0.05 ms a step) when it has at least this much to do.
_MIN_WORK_SECONDS = 2e-4
_NEXT_TO_NOTHING = 1.02


def cores() -> list[frozenset[int]]:
    """Physical cores by their CPUs (hyper-threads), as far as this process may run on them."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings: dict[str, set[int]] = {}
    for cpu in sorted(allowed):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.setdefault(path.read_text() if path.exists() else str(cpu), set()).add(cpu)
    return [frozenset(cpus) for cpus in siblings.values()]


def physical_cores() -> int:
    """Number of them that this process may keep busy: a quota may allow fewer, and torchrun's others have some."""
    count = len(cores())
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            count = min(count, int(limit) // int(period))
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def keep_to(process: int, core: frozenset[int]) -> None:
    """Let a process run on one core alone, where the system can; nothing if it may not, or the process is gone."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(process, core)


@dataclass(frozen=True)
class Part:
    """The slots that one of several processes steps: some environments of some tasks, both by number.

    Attributes:
        envs_per_task: environments of every task in all processes together.
    """

    tasks: tuple[int, ...]
    envs: tuple[int, ...]
    envs_per_task: int

    def of(self, per_task: Sequence[X]) -> list[X]:
        """Return the entries of its tasks."""
        return [per_task[task] for task in self.tasks]


def part_of(rank: int, ranks: int, num_tasks: int, envs_per_task: int, tasks_per_rank: int | None) -> Part:
    """Deal out slots to ``ranks``: some of the environments of every task, or of ``tasks_per_rank`` at most.

    Tasks are dealt to groups of ranks, and the environments of a task within its group; a part may be empty.

    Raises:
        UserError: the groups would not be of one size.
    """
    groups = 1 if tasks_per_rank is None else -(-num_tasks // tasks_per_rank)
    if ranks % groups:
        raise UserError(
            f"tasks_per_rank={tasks_per_rank} deals {num_tasks} tasks to {groups} groups of ranks, and there are "
            f"{ranks} ranks; start {groups} or a multiple, or give another tasks_per_rank"
        )
    group, share = rank % groups, rank // groups
    envs = range(share, envs_per_task, ranks // groups)
    return Part(tuple(range(group, num_tasks, groups)), tuple(envs), envs_per_task)


def can_use_workers() -> bool:
    """Return True if this system can hand file descriptors to child processes (Windows cannot)."""
    return os.name == "posix"


def choose_workers(workers: int, envs_per_task: int, step_seconds: Sequence[float]) -> int:
    """Number of processes to use.

    ``workers = 0`` means one per physical core, as long as each has enough to do; ``step_seconds`` is what
    one step of one environment costs, roughly, per task. ``workers = 1`` means in this process. Results do not
    depend on it.
    """
    if workers < 0:
        raise UserError(f"workers={workers} is not possible: 0 means automatic, 1 in process, n processes")
    if not can_use_workers():
        return 1
    if workers == 0:
        workers = min(physical_cores(), int(envs_per_task * sum(step_seconds) / _MIN_WORK_SECONDS))
    return max(1, min(workers, envs_per_task * len(step_seconds)))


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
