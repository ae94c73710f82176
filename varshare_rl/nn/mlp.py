"""Networks of task layers: the multilayer perceptron that most architectures are, and BroNet of residual blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from varshare_rl.nn.task_rows import TaskIds
from varshare_rl.ops.activations import ACTIVATIONS
from varshare_rl.ops.gradient_record import GradientRecord, Recorder
from varshare_rl.ops.linear import recorded_layer_norm


class SharedLayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` whose scale and offset can have their gradients told apart by task."""

    recorder: Recorder | None = None  # who wants them

    def forward(self, input: Tensor) -> Tensor:
        """``[..., F]`` to ``[..., F]``."""
        if self.recorder is None:
            return super().forward(input)
        record = GradientRecord(self.recorder, self.weight, self.bias)
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


class BroNet(nn.Module):
    """A wide residual network that stays trainable as it grows (Nauman et al. 2024, section 4, "BroNet").

    ``x_0 = act(norm(layer(x)))``, then for every further hidden size ``x_{k+1} = x_k + norm(layer(act(norm(layer(
    x_k)))))``, then the head. Two hidden sizes are thus one residual block of two layers.

    Args:
        sizes: input, hidden and output sizes; the hidden ones are all the same.
        layer: makes a task layer ``layer(x, task_ids, temperature)`` from its input and output size.
        activation: a key of ``ACTIVATIONS``.
        temperature: factor on the spread of every posterior.

    Raises:
        ValueError: there is no hidden size, or they differ.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        layer: Callable[[int, int], nn.Module],
        activation: str,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        inputs, *hidden, outputs = sizes
        if len(set(hidden)) != 1:
            raise ValueError(f"hidden sizes are {hidden}; residual blocks need at least one, and all the same")
        widths = [inputs, hidden[0], *[hidden[0]] * (2 * (len(hidden) - 1)), outputs]
        self.layers = nn.ModuleList(layer(a, b) for a, b in pairwise(widths))
        self.norms = hidden_norms(widths[1:-1], layer_norm=True)
        self.activation = ACTIVATIONS[activation]
        self.temperature = temperature

    def forward(self, x: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, F]`` to ``[T, B, G]``, or any layout the layers take."""
        x = self.activation(self._normed(0, x, task_ids))
        for first in range(1, len(self.norms), 2):
            inner = self.activation(self._normed(first, x, task_ids))
            x = x + self._normed(first + 1, inner, task_ids)
        return self.layers[-1](x, task_ids, self.temperature)  # type: ignore[no-any-return]

    def _normed(self, index: int, x: Tensor, task_ids: TaskIds) -> Tensor:
        return self.norms[index](self.layers[index](x, task_ids, self.temperature))  # type: ignore[no-any-return]
