"""The multilayer perceptron of task layers that most architectures are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from varshare_rl.nn.task_rows import TaskIds
from varshare_rl.ops.activations import ACTIVATIONS
from varshare_rl.ops.norm import recorded_layer_norm
from varshare_rl.ops.recording import Recorder, Recording


class SharedLayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` whose scale and offset can have their gradients told apart by task."""

    recorder: Recorder | None = None  # who wants them

    def forward(self, input: Tensor) -> Tensor:
        """``[..., F]`` to ``[..., F]``."""
        if self.recorder is None:
            return super().forward(input)
        record = Recording(self.recorder, self.weight, self.bias)
        return recorded_layer_norm(input, self.weight, self.bias, self.eps, record)


def hidden_norms(hidden: Sequence[int], layer_norm: bool) -> nn.ModuleList:
    """What stands between each hidden layer and its activation: a LayerNorm (Ba et al. 2016), or nothing."""
    return nn.ModuleList(SharedLayerNorm(size) if layer_norm else nn.Identity() for size in hidden)


class TaskMLP(nn.Module):
    """Task layers with an activation between them.

    Args:
        sizes: input, hidden and output sizes.
        layer: makes a task layer ``layer(x, task_ids, temperature)`` from its input and output size.
        activation: a key of ``ACTIVATIONS``.
        temperature: factor on the spread of every posterior.
        layer_norm: normalise each hidden layer's output before its activation (Ba et al. 2016), with a scale and
            an offset that all tasks share.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        layer: Callable[[int, int], nn.Module],
        activation: str,
        temperature: float = 1.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(a, b) for a, b in pairwise(sizes))
        self.activation = ACTIVATIONS[activation]
        self.temperature = temperature
        self.norms = hidden_norms(sizes[1:-1], layer_norm)

    def forward(self, x: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, F]`` to ``[T, B, G]``, or any layout the layers take."""
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = self.activation(norm(layer(x, task_ids, self.temperature)))
        return self.layers[-1](x, task_ids, self.temperature)  # type: ignore[no-any-return]
