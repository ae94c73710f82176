"""Gradients per task of parameters that all tasks share, written down while one backward pass runs.

In the task-major layout ``[T, B, F]`` block ``i`` of a layer's input meets loss ``i`` alone. So a layer can tell
the tasks' gradients of its shared parameters apart: those of a weight are one batched product of
``grad [T, B, G]`` and ``x [T, B, F]``, where the sum over tasks is a product of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Recorder:
    """Place that layers write their shared parameters' gradients per task to, while :meth:`listening`.

    A layer takes part by having an attribute ``recorder``, None at first, and by handing it to the functions of
    :mod:`varshare_rl.ops.linear`. What a function writes down it does not add to
    the parameter's ``grad``, so whatever arrives there came another way.
    """

    rows: dict[int, Tensor] = field(default_factory=dict)  # by id of the parameter, [T, *its shape]
    written: set[int] = field(default_factory=set)

    @contextmanager
    def listening(self, rows: Mapping[int, Tensor]) -> Iterator[None]:
        """Inside, gradients are added to ``rows``, which must be zero."""
        self.rows, self.written = dict(rows), set()
        try:
            yield
        finally:
            self.rows = {}

    def wants(self, parameter: Tensor, like: Tensor) -> Tensor | None:
        """Rows ``[T, *shape]`` to add to; None unless the first dimension of ``like [T, ...]`` is the tasks."""
        rows = self.rows.get(id(parameter))
        if rows is None or like.dim() < 2 or like.shape[0] != rows.shape[0]:
            return None
        self.written.add(id(parameter))
        return rows

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return self  # a copied network, such as a target critic, is not the one that is recorded


@dataclass(frozen=True)
class GradientRecord:
    """The shared parameters behind one use of a layer, and who wants their gradients per task.

    ``columns`` counts the leading columns of ``weight`` that the use multiplies with; None: all.
    """

    recorder: Recorder
    weight: Tensor
    bias: Tensor | None = None
    columns: int | None = None

    def takes(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Rows of weight and bias to add to, or None if this pass is not recorded."""
        if not self.recorder.rows or x.dim() != 3:
            return None
        weight = self.recorder.wants(self.weight, grad)
        bias = None if self.bias is None else self.recorder.wants(self.bias, grad)
        if weight is None or (self.bias is not None and bias is None):
            return None
        return weight if self.columns is None else weight[:, :, : self.columns], bias


def per_task_offset(weight: Tensor, bias: Tensor, columns: int, ids: Tensor, recorder: Recorder) -> Tensor:
    """Offset of every block by the one-hot code of its task: ``weight[:, columns + ids[k]] + bias``, ``[K, G]``."""
    offset: Tensor = _Offset.apply(weight, bias, columns, ids, recorder)  # type: ignore[no-untyped-call]
    return offset


class _Offset(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, columns: int, ids: Tensor, recorder: Recorder) -> Tensor:
        ctx.parameters, ctx.columns, ctx.ids, ctx.recorder = (weight, bias), columns, ids, recorder
        return weight.t().index_select(0, ids + columns) + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias = ctx.parameters
        rows, bias_rows = (ctx.recorder.wants(parameter, grad) for parameter in (weight, bias))
        columns = ctx.ids + ctx.columns
        if rows is not None and bias_rows is not None:
            rows[torch.arange(len(rows), device=grad.device), :, columns] += grad
            bias_rows += grad
            return None, None, None, None, None
        grad_weight = torch.zeros_like(weight).index_add_(1, columns, grad.t())
        return grad_weight, grad.sum(0), None, None, None
