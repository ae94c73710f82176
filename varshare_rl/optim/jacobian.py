"""Gradients of every task's loss with respect to the parameters that the tasks share, and the way to one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varshare_rl.ops.gradient_record import Recorder
from varshare_rl.ranks import ALONE, Ranks
from varshare_rl.state import Stateful

#: Relative difference from which a recorded gradient counts as one that other tasks' losses reach.
MIXED = 1e-4


class TaskGradients(Stateful):
    """The Jacobian of losses ``[T]`` in the shared parameters, from one backward pass where that can be.

    Layers with a ``recorder`` (see :mod:`varshare_rl.ops.gradient_record`) write down the gradients of their shared
    parameters per task during a backward pass of the mean loss. A parameter that the mean's gradient reaches in
    another way, too, gets its rows from ``T`` backward passes instead, as does one whose recorded rows are
    reached by the losses of several tasks. The first is seen in every step: the recorded part does not arrive in
    ``grad``, so whatever is there came another way. The second is looked for in steps 1, 2, 4, 8, ...: a second
    pass weighs the losses, every one otherwise, and a row that depends on its own loss alone is multiplied by its
    own weight.

    Args:
        trained: the module whose layers are to record; None: nothing records.
        shared: the parameters that the Jacobian is of, one after the other in its columns.
    """

    state_fields = ("steps", "mixed")

    def __init__(self, trained: nn.Module | None, shared: Sequence[nn.Parameter]) -> None:
        self.shared = list(shared)
        self.recorder = Recorder()
        self.steps = 0
        self.mixed: set[int] = set()  # positions in ``shared``
        self.reached: set[int] = set()  # those that the last losses depend on
        self._rows: Tensor | None = None
        for layer in () if trained is None else trained.modules():
            if hasattr(layer, "recorder"):
                layer.recorder = self.recorder  # type: ignore[assignment]

    def __call__(self, losses: Tensor) -> Tensor:
        """Rows ``[T, P]``: the gradient of ``losses[i] / T``, so that their sum is the gradient of the mean.

        Every other parameter is left with the gradient of the mean in ``grad``; the shared ones with none. The
        rows are overwritten by the next call.
        """
        if self._rows is None or self._rows.shape[0] != len(losses):
            self._rows = self.zeros(len(losses))
        rows = self._rows.zero_()
        views = self.views(rows)
        with self.recorder.listening({id(p): view for p, view in zip(self.shared, views, strict=True)}):
            torch.autograd.backward(losses.mean(), retain_graph=True)
        self.steps += 1
        if self.steps & (self.steps - 1) == 0:
            self._look_for_mixing(losses, rows)
        slow = [index for index, p in enumerate(self.shared) if p.grad is not None or index in self.mixed]
        recorded = [index for index, p in enumerate(self.shared) if id(p) in self.recorder.written]
        self.reached = {*slow, *recorded}
        for parameter in self.shared:
            parameter.grad = None
        if slow:
            self._one_at_a_time(losses, slow, views)
        return rows

    def views(self, flat: Tensor) -> list[Tensor]:
        """``[..., P]`` cut into ``[..., *shape]`` for every shared parameter, without a copy."""
        sizes = [parameter.numel() for parameter in self.shared]
        pieces = torch.split(flat, sizes, dim=-1)
        return [piece.view(*piece.shape[:-1], *p.shape) for piece, p in zip(pieces, self.shared, strict=True)]

    def zeros(self, *leading: int) -> Tensor:
        """Zeros ``[*leading, P]``."""
        like = self.shared[0]
        return like.new_zeros(*leading, sum(parameter.numel() for parameter in self.shared))

    def _one_at_a_time(self, losses: Tensor, slow: list[int], views: list[Tensor]) -> None:
        """Fill the rows of some parameters by one backward pass per task."""
        parameters = [self.shared[index] for index in slow]
        for task, loss in enumerate(losses / len(losses)):
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for index, grad in zip(slow, grads, strict=True):
                if grad is None:
                    views[index][task].zero_()
                else:
                    views[index][task].copy_(grad)

    def _look_for_mixing(self, losses: Tensor, rows: Tensor) -> None:
        """Note the parameters some of whose recorded rows depend on another task's loss."""
        if len(losses) == 1 or not self.recorder.written:
            return
        weights = _different(len(losses)).to(losses)
        again = torch.zeros_like(rows)
        recorded = [index for index, p in enumerate(self.shared) if id(p) in self.recorder.written]
        rows_by_id = {id(p): view for p, view in zip(self.shared, self.views(again), strict=True)}
        with self.recorder.listening(rows_by_id):
            parameters = [self.shared[index] for index in recorded]
            weighted = torch.dot(losses, weights) / len(losses)
            torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
        again /= weights.unsqueeze(1)
        once, twice = self.views(rows), self.views(again)
        for index in recorded:
            size = once[index].flatten(1).norm(dim=1)
            apart = (twice[index] - once[index]).flatten(1).norm(dim=1)
            if bool((apart > MIXED * (size + 1e-2 * size.max())).any()):
                self.mixed.add(index)


class GradientAggregator(Stateful):
    """From the tasks' gradients of the shared parameters to one."""

    def __call__(self, rows: Tensor, losses: Tensor, kept: Tensor | None) -> Tensor:
        """``rows [T, P]``, the gradients of ``losses [T] / T``, to the gradient to follow, ``[P]``.

        ``kept [T]`` bool: the tasks that count; the other rows are zero. None: all.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Remember nothing, as at the start."""


def _different(tasks: int) -> Tensor:
    """A weight for each task, no two alike: powers of 2, and from the 33rd task on what lies between them."""
    index = torch.arange(tasks, dtype=torch.float64)
    between = (index // 32) / (tasks // 32 + 1)  # in [0, 1)
    return torch.exp2(index % 32 - 16) * (1.0 + between)


def gradient_gram(losses: Tensor, parameters: Sequence[nn.Parameter], ranks: Ranks = ALONE) -> Tensor:
    """``<g_i, g_j>`` of ``g_i``, the gradient of ``losses[i]`` by ``parameters`` as one vector: ``[T, T]`` float64.

    A pair with a negative product is in conflict: a step that helps one of the two alone hurts the other, to first
    order (Yu et al. 2020, *Gradient Surgery for Multi-Task Learning*). Costs ``T`` backward passes, keeps the graph
    for the step that follows, leaves ``.grad`` as it is and draws no random number.
    """
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]))
    matrix = torch.stack(rows).detach()
    ranks.average([matrix])
    return (matrix @ matrix.t()).double()
