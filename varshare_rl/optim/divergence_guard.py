"""Keep a task whose loss has diverged from taking the others with it."""

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
    "Whether a task whose loss is NaN or infinite is left out; and no step is taken on a gradient that is."
    explosion: float = bounded(0.0, least=0)
    """A task is left out where its loss is this many times its running average, until that has followed; 0: never,
    otherwise above 1."""

    def check(self, prefix: str) -> None:
        """Raise UserError for a factor that every loss passes."""
        if 0 < self.explosion <= 1:
            raise UserError(f"{prefix}explosion is {self.explosion}; it must be above 1, or 0 to switch it off")


class DivergenceGuard:
    """Decides which tasks a step leaves out, and counts them.

    On a CPU each step looks at its losses. On CUDA that would wait for the device, so a step with a bad loss is
    dropped whole, on the device, until :meth:`look` has found out; then steps look until all is well again.

    With ``explosion = k`` a task is left out where ``|loss| > k m`` with ``m`` the running average of its
    ``|loss|`` (decay 0.99), from the 101st step on. A loss that was left out is not averaged: it doubles ``m`` in
    100 steps instead, however large it is. So what stays at ``j > k`` times the old level counts again after
    ``100 log2(j / k)`` steps, and what grows faster than that does not.
    """

    def __init__(self, config: DivergenceGuardConfig) -> None:
        self.config = config
        self.looking = False  # on CUDA: whether a step may wait for the device
        self.masked: Tensor | None = None  # [T] steps that each task was left out of
        self._average: Tensor | None = None  # [T] running |loss|
        self._fitting: Tensor | None = None  # [T] bool, of this step; True for what was left out already
        self._steps = 0
        self._seen = 0

    def kept(self, losses: Tensor, wait: bool) -> Tensor | None:
        """Which tasks a step keeps, ``[T]`` bool; None: all of them, as far as is known without waiting.

        ``wait``: look at the losses even if they are on a device.
        """
        if not self.config.non_finite and not self.config.explosion:
            return None
        if self.masked is None:
            window = active_tasks()
            tasks = len(losses) if window is None else window.num_tasks
            self.masked = torch.zeros(tasks, dtype=torch.int64, device=losses.device)
        self._fitting = self._fit(losses.detach())
        if not (wait or self.looking or self._sees(losses)) or bool(self._fitting.all()):
            return None
        self._count(~self._fitting)
        kept, self._fitting = self._fitting, torch.ones_like(self._fitting)
        return kept

    def drop(self, norm: Tensor) -> Tensor | None:
        """1 where the step with this norm of the gradient must not be made, else 0; None: no guard.

        Counted for the tasks whose losses are to blame and were not left out yet, or, without one, for all.
        """
        if self._fitting is None or self.masked is None:
            return None
        bad = ~torch.isfinite(norm) if self.config.non_finite else torch.zeros_like(norm, dtype=torch.bool)
        fit = self._fitting.all()
        self._count(torch.where(fit, bad, ~self._fitting))
        return (bad | ~fit).float()

    def look(self) -> None:
        """Find out whether a task was left out since the last call; waits for the device."""
        if self.masked is None or self._sees(self.masked):
            return
        total = int(self.masked.sum())
        self.looking, self._seen = total != self._seen, total

    def forget(self) -> None:
        """Drop the running averages: losses of other parameters are no measure. Counts stay."""
        self._average, self._steps = None, 0

    def _count(self, left_out: Tensor) -> None:
        """Add ``left_out [T]``, or ``[K]`` of the tasks of an open window."""
        assert self.masked is not None
        window = active_tasks()
        if window is None:
            self.masked += left_out
        else:
            self.masked[window.ids.to(self.masked.device)] += left_out

    def _sees(self, tensor: Tensor) -> bool:
        """Whether looking at a number costs no waiting for a device."""
        return tensor.is_cpu

    def _fit(self, losses: Tensor) -> Tensor:
        """``[T]`` bool: losses to learn from. Moves the running averages."""
        kept = torch.isfinite(losses) if self.config.non_finite else torch.ones_like(losses, dtype=torch.bool)
        if not self.config.explosion:
            return kept
        size = losses.abs()
        average = torch.zeros_like(size) if self._average is None else self._average
        new = average == 0.0  # nothing but losses that are not finite so far
        self._steps += 1
        if self._steps > TRUSTED_AFTER:
            kept = kept & ((size <= self.config.explosion * average) | new)
        taken = torch.where(new, size, torch.lerp(size, average, _AVERAGE))
        missed = torch.where(torch.isfinite(size), average * _FOLLOW, average)
        self._average = torch.where(kept, taken, missed)
        return kept

    def state(self) -> Tree:
        """Counts and running averages."""
        return {"masked": self.masked, "average": self._average, "steps": self._steps}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Put back what :meth:`state` gave."""
        self.masked, self._average = (
            None if state[name] is None else state[name].to(device) for name in ("masked", "average")
        )
        self._steps = state["steps"]
        self._seen = 0 if self.masked is None else int(self.masked.sum())


@contextmanager
def contained(losses: Tensor) -> Iterator[None]:
    """Inside, nothing that is not finite spreads in backward passes from ``losses``.

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
                plain = _each_once(
                    tensor.data
                )  # .data: unlike a detached one it leaves autograd's count of writes alone
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
    """The part of an expanded tensor that has memory of its own."""
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _finite(grad_inputs: tuple[Tensor | None, ...], grad_outputs: object) -> tuple[Tensor | None, ...]:
    return tuple(None if grad is None else torch.nan_to_num(grad, 0.0, 0.0, 0.0) for grad in grad_inputs)


def _graph(losses: Tensor) -> Iterator[Any]:
    """All nodes behind ``losses`` except the ends, where gradients gather."""
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
    """What the forward pass saved for this node: of torch's own functions, and of those written in Python."""
    names = [name for name in dir(node) if name.startswith("_saved_")]
    values = [getattr(node, name) for name in names] + list(getattr(node, "saved_tensors", ()))
    for value in values:
        for entry in value if isinstance(value, list | tuple) else (value,):
            if isinstance(entry, Tensor):
                yield entry
