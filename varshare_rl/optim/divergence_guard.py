"""A guard that keeps a task whose loss has diverged from taking the others with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.task_rows import active_tasks
from varshare_rl.state import Stateful
from varshare_rl.types import Tree

#: Steps before a task's running loss is trusted as a measure of an explosion.
TRUSTED_AFTER = 100
_AVERAGE = 0.99
#: Factor on the running loss in a step that leaves the task out: twofold in 100 steps.
_FOLLOW = 2.0**0.01


@dataclass
class DivergenceGuardConfig:
    """Options of ``divergence_guard``: which tasks are left out of a step."""

    non_finite: bool = True
    "Leave out a task whose loss is NaN or infinite, and take no step on a gradient that is."
    explosion: float = bounded(0.0, least=0)
    """Leave out a task whose loss is this many times its running average, until that has followed; above 1, or 0:
    never."""

    def check(self, prefix: str) -> None:
        """Raise UserError for a factor that every loss passes."""
        if 0 < self.explosion <= 1:
            raise UserError(f"{prefix}explosion is {self.explosion}; it must be above 1, or 0 to switch it off")


class DivergenceGuard(Stateful):
    """Decides which tasks a step leaves out, and counts them.

    On a CPU each step looks at its losses. On CUDA that would wait for the device, so a step with a bad loss is
    dropped whole, on the device, until :meth:`look` has found out; then steps look until all is well again.

    With ``explosion = k`` a task is left out where ``|loss| > k m`` with ``m`` the running average of its
    ``|loss|`` (decay 0.99), from the 101st step on. A loss that was left out is not averaged: it doubles ``m`` in
    100 steps instead, however large it is. So what stays at ``j > k`` times the old level counts again after
    ``100 log2(j / k)`` steps, and what grows faster than that does not.

    Attributes:
        watches_size: finite losses may be left out, too.
        fitting: ``[T]`` bool, the tasks whose losses of this step are fit to learn from or were left out already.
        masked: ``[T]``, steps that each task was left out of; None before the first.
        idle: steps in a row that every task was left out of, as far as is known without waiting for a device.
    """

    state_fields = ("masked", "average=_average", "steps=_steps")

    def __init__(self, config: DivergenceGuardConfig, on_cpu: bool) -> None:
        self.config, self.on_cpu = config, on_cpu
        self.watches_size = config.explosion > 0
        self.looking = False  # on CUDA: a step may wait for the device
        self.masked: Tensor | None = None
        self.idle = 0
        self.fitting = torch.ones(0, dtype=torch.bool)
        self._average: Tensor | None = None  # [T] running |loss|
        self._steps = 0
        self._seen = 0

    def kept(self, losses: Tensor, wait: bool) -> Tensor | None:
        """Return the tasks that a step keeps, ``[T]`` bool; None: all, as far as is known without waiting.

        ``wait``: look at the losses even if they are on a device.
        """
        if not self.config.non_finite and not self.watches_size:
            return None
        self.fitting = self._fit(losses.detach())
        if not (wait or self.looking or self.on_cpu) or bool(self.fitting.all()):
            return None
        self._count(~self.fitting)
        kept, self.fitting = self.fitting, torch.ones_like(self.fitting)
        return kept

    def drop(self, norm: Tensor) -> Tensor | None:
        """Return 1 where the step with this norm of the gradient must not be made, else 0; None: no guard.

        Counted for the tasks whose losses are to blame and were not left out yet, or, without one, for all.
        """
        if not self.config.non_finite and not self.watches_size:
            return None
        bad = ~torch.isfinite(norm) if self.config.non_finite else torch.zeros_like(norm, dtype=torch.bool)
        fit = self.fitting.all()
        self._count(torch.where(fit, bad, ~self.fitting))
        return (bad | ~fit).float()

    def look(self) -> None:
        """Find out if a task was left out since the last call; waits for the device."""
        if self.masked is None or self.on_cpu:
            return
        total = int(self.masked.sum())
        self.looking, self._seen = total != self._seen, total

    def forget(self) -> None:
        """Drop the running averages: losses of other parameters are no measure. Counts stay."""
        self._average, self._steps = None, 0

    def load_state(self, state: Tree) -> None:
        super().load_state(state)
        self._seen = 0 if self.masked is None else int(self.masked.sum())

    def _count(self, left_out: Tensor) -> None:
        """Add ``left_out [T]``, or ``[K]`` of the tasks of an open subset."""
        subset = active_tasks()
        if self.masked is None:
            tasks = len(left_out) if subset is None else subset.num_tasks
            self.masked = torch.zeros(tasks, dtype=torch.int64)
        self.masked = self.masked.to(left_out.device)
        if subset is None:
            self.masked += left_out
        else:
            self.masked[subset.ids.to(self.masked.device)] += left_out

    def _fit(self, losses: Tensor) -> Tensor:
        """Return ``[T]`` bool: losses to learn from. Moves the running averages."""
        kept = torch.isfinite(losses) if self.config.non_finite else torch.ones_like(losses, dtype=torch.bool)
        if not self.watches_size:
            return kept
        size = losses.abs()
        average = torch.zeros_like(size) if self._average is None else self._average.to(size.device)
        new = average == 0.0  # nothing but losses that are not finite so far
        self._steps += 1
        if self._steps > TRUSTED_AFTER:
            kept = kept & ((size <= self.config.explosion * average) | new)
        taken = torch.where(new, size, torch.lerp(size, average, _AVERAGE))
        missed = torch.where(torch.isfinite(size), average * _FOLLOW, average)
        self._average = torch.where(kept, taken, missed)
        return kept


@contextmanager
def contained(losses: Tensor) -> Iterator[None]:
    """Keep what is not finite, inside, from going on in backward passes from ``losses``.

    A loss that is not counted sends a gradient of zero backwards, but ``0 * NaN`` and ``0 * inf`` are NaN, and a
    product over all rows takes them into the gradients that the tasks share. So NaN and infinity become zero in
    what the forward pass has saved, and in every gradient on its way. What was saved is put back at the end: it
    may be anyone's data.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    handles = []
    for node in _graph(losses):
        handles.append(node.register_hook(_finite))
        for tensor in _saved_by(node):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                # .data: unlike a detached one it leaves autograd's count of writes alone
                plain = _each_once(tensor.data)
                saved.append((plain, plain.clone()))
                plain.nan_to_num_(0.0, 0.0, 0.0)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for plain, before in reversed(saved):
            plain.copy_(before)


def _each_once(tensor: Tensor) -> Tensor:
    """Return the part of an expanded tensor that has memory of its own."""
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _finite(grad_inputs: tuple[Tensor | None, ...], grad_outputs: object) -> tuple[Tensor | None, ...]:
    return tuple(None if grad is None else torch.nan_to_num(grad, 0.0, 0.0, 0.0) for grad in grad_inputs)


def _graph(losses: Tensor) -> Iterator[Any]:
    """Yield all nodes behind ``losses`` except the ends, where gradients gather."""
    waiting: list[Any] = [losses.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or hasattr(node, "variable"):
            continue
        seen.add(node)
        yield node
        waiting += [next_action for next_action, _ in node.next_functions]


def _saved_by(node: Any) -> Iterator[Tensor]:
    """Yield the tensors that the forward pass saved for this node, of torch's own functions and of Python ones."""
    names = [name for name in dir(node) if name.startswith("_saved_")]
    values = [getattr(node, name) for name in names] + list(getattr(node, "saved_tensors", ()))
    for value in values:
        for entry in value if isinstance(value, list | tuple) else (value,):
            if isinstance(entry, Tensor):
                yield entry
