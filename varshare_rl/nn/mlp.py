"""The multilayer perceptron of task layers that most architectures are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from varshare_rl.nn.task_rows import TaskIds
from varshare_rl.ops.activations import ACTIVATIONS


class TaskMLP(nn.Module):
    """Task layers with an activation between them.

    Args:
        sizes: input, hidden and output sizes.
        layer: makes a task layer ``layer(x, task_ids, temperature)`` from its input and output size.
        activation: a key of ``ACTIVATIONS``.
        temperature: factor on the spread of every posterior.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        layer: Callable[[int, int], nn.Module],
        activation: str,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(a, b) for a, b in pairwise(sizes))
        self.activation = ACTIVATIONS[activation]
        self.temperature = temperature

    def forward(self, x: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, F]`` to ``[T, B, G]``, or any layout the layers take."""
        for index, layer in enumerate(self.layers):
            x = layer(x if index == 0 else self.activation(x), task_ids, self.temperature)
        return x
