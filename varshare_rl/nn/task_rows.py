"""One place that understands the three ways to say which row of a batch belongs to which task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

#: One id for everything, ids ``[T]`` for task-major ``[T, B, F]``, or ids ``[N]`` for flat ``[N, F]``.
TaskIds = int | Tensor


@lru_cache(maxsize=256)
def all_tasks(num_tasks: int) -> Tensor:
    """The ids ``0 .. num_tasks - 1``. Ids live on the CPU: they index, they are not data."""
    return torch.arange(num_tasks)


@dataclass(frozen=True)
class ActiveTasks:
    """Stacked tensors hold the rows of the tasks ``ids [K]``, in this order, and not of all ``num_tasks``."""

    ids: Tensor
    num_tasks: int


_active: ActiveTasks | None = None


def active_tasks() -> ActiveTasks | None:
    """The subset of the tasks that is open, see :mod:`varshare_rl.optim.task_subset`."""
    return _active


@contextmanager
def restrict_tasks(subset: ActiveTasks) -> Iterator[None]:
    """Inside, batches are of the subset's tasks, whose rows stacked tensors hold."""
    global _active
    assert _active is None, "subsets do not nest"
    _active = subset
    try:
        yield
    finally:
        _active = None


def in_order(ids: Tensor, num_tasks: int, stacked: bool = True) -> bool:
    """Return True when ``ids [K]`` are all tasks in order; of stacked tensors: those whose rows they hold."""
    subset = _active if stacked else None
    return torch.equal(ids, all_tasks(num_tasks) if subset is None else subset.ids)


@dataclass(frozen=True)
class TaskRows:
    """A batch brought to task-major form.

    ``x: [K, B, F]`` belongs to the tasks ``ids: [K]``; ``ids`` is None when they are all tasks in order, so
    that stacked parameters are used as they are. ``positions`` says where the rows of a flat batch went.
    """

    x: Tensor
    ids: Tensor | None
    shape: torch.Size
    positions: tuple[Tensor, Tensor] | None = None

    def select(self, stacked: Tensor) -> Tensor:
        """Rows of a stacked per-task tensor for the tasks of this batch: ``[T, ...]`` to ``[K, ...]``."""
        if self.ids is None:
            return stacked
        return stacked.index_select(0, self.ids.to(stacked.device, non_blocking=True))

    def split(self, parts: int) -> TaskRows:
        """Deal the rows of each task into up to ``parts`` blocks of one size, the last padded with zeros.

        ``x`` becomes ``[K * parts, ceil(B / parts), F]``; :meth:`merge` undoes it for the outputs.
        """
        tasks, batch, size = self.x.shape
        if min(parts, batch) <= 1:
            return self
        each = -(-batch // parts)
        blocks = -(-batch // each)
        x = self.x if blocks * each == batch else pad(self.x, (0, 0, 0, blocks * each - batch))
        ids = all_tasks(tasks) if self.ids is None else self.ids
        return TaskRows(x.reshape(tasks * blocks, each, size), ids.repeat_interleave(blocks), self.shape)

    def merge(self, y: Tensor) -> Tensor:
        """Outputs ``[K * parts, ceil(B / parts), G]`` of the blocks of :meth:`split` as ``[K, B, G]``."""
        tasks, batch = self.x.shape[:2]
        return y if y.shape[:2] == (tasks, batch) else y.reshape(tasks, -1, y.shape[-1])[:, :batch]

    def restore(self, y: Tensor) -> Tensor:
        """Bring an output ``[K, B, G]`` back to the layout the caller used."""
        if self.positions is not None:
            return y[self.positions]
        return y if y.shape[:-1] == self.shape[:-1] else y.reshape(*self.shape[:-1], y.shape[-1])


def task_rows(x: Tensor, task_ids: TaskIds, num_tasks: int, stacked: bool = True) -> TaskRows:
    """Bring ``x`` to task-major form.

    Args:
        x: ``[T, B, F]`` with ids ``[T]``; ``[N, F]`` with ids ``[N]``, each row with its own task; or any
            ``[..., F]`` with one id.
        task_ids: an int, or an integer tensor (best on the CPU: a CUDA tensor is copied to check it).
        num_tasks: number of tasks.
        stacked: the rows are for stacked tensors, which hold a subset's tasks alone where one is open.

    Raises:
        IndexError: an id is not one of the ``num_tasks`` tasks; the message names it.
        ValueError: the shapes of ``x`` and ``task_ids`` do not fit each other.
    """
    if type(task_ids) is int:  # asks nothing of a tensor's values, so that a pass of one task can be traced
        return _rows_of_one(x, task_ids, num_tasks)
    ids = torch.as_tensor(task_ids).cpu()
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"task ids have dtype {ids.dtype}; they must be integers")
    ids = ids.long()
    if ids.dim() == 0:
        return _rows_of_one(x, int(ids), num_tasks)
    if ids.dim() != 1 or x.dim() not in (2, 3) or x.shape[0] != ids.shape[0]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit task ids of shape {tuple(ids.shape)}; "
            "give [T, B, F] with [T], [N, F] with [N], or one id"
        )
    if x.dim() == 3:
        if in_order(ids, num_tasks, stacked):
            return TaskRows(x, None, x.shape)
        _check(ids, num_tasks)
        return TaskRows(x, ids, x.shape)
    _check(ids, num_tasks)
    return group_rows(x, ids)


def _rows_of_one(x: Tensor, task: int, num_tasks: int) -> TaskRows:
    if not 0 <= task < num_tasks:
        raise unknown_task(task, num_tasks)
    return TaskRows(x.reshape(1, -1, x.shape[-1]), None if num_tasks == 1 else torch.tensor([task]), x.shape)


def _check(ids: Tensor, num_tasks: int) -> None:
    outside = (ids < 0) | (ids >= num_tasks)
    if bool(outside.any()):
        raise unknown_task(int(ids[outside][0]), num_tasks)


def unknown_task(task: int, num_tasks: int) -> IndexError:
    """The error that names an unknown id."""
    return IndexError(f"unknown task id {task}: this network has {num_tasks} tasks (0 to {num_tasks - 1})")


def group_rows(x: Tensor, ids: Tensor) -> TaskRows:
    """Sort the rows of a flat batch ``[N, F]`` by id into ``[K, B_max, F]``, padded with zeros."""
    tasks, block, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    order = torch.argsort(block, stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=ids.device) - starts[block[order]]
    positions = (block.to(x.device), place.to(x.device))
    most = int(counts.max()) if len(counts) else 0
    padded = x.new_zeros(len(tasks), most, x.shape[-1]).index_put(positions, x)
    return TaskRows(padded, tasks, x.shape, positions)
