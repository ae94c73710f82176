"""Networks of layers: activations, norms, multilayer perceptrons of task layers or of stacked copies, BroNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from varshare_rl.nn.layer import check_positive, linear_parameters
from varshare_rl.nn.task_rows import TaskIds, task_rows
from varshare_rl.ops.gradient_record import GradientRecord, Recorder
from varshare_rl.ops.linear import linear, recorded_layer_norm


def tanh(x: Tensor) -> Tensor:
    """``tanh(x)``; in float32 on a CPU as ``2 sigmoid(2 x) - 1``, which PyTorch computes several times quicker.

    The absolute error of that form is below 2.5e-7. Differentiable once.
    """
    if x.is_cpu and x.dtype == torch.float32:
        y: Tensor = _Tanh.apply(x)  # type: ignore[no-untyped-call]
        return y
    return torch.tanh(x)


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = (2.0 * x).sigmoid_().mul_(2.0).sub_(1.0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        slope: Tensor = torch.ops.aten.tanh_backward(grad, y)
        return slope


def leaky_relu(x: Tensor) -> Tensor:
    """``max(x, 0.2 x)``: with the slope that is TensorFlow's default, and so that of Continual World's agents."""
    return F.leaky_relu_(x, LEAKY_SLOPE)


LEAKY_SLOPE = 0.2
#: Activations between layers, by name. They may overwrite their argument.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,
    "tanh": tanh,
    "silu": F.silu,
    "elu": F.elu,
    "leaky_relu": leaky_relu,
}


class SharedLayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` whose scale and offset can have their gradients told apart by task."""

    recorder: Recorder | None = None  # who wants them

    def forward(self, input: Tensor, task_id: TaskIds | None = None) -> Tensor:
        """``[..., F]`` to ``[..., F]``; the task id is accepted and ignored."""
        if self.recorder is None:
            return super().forward(input)
        record = GradientRecord(self.recorder, self.weight, self.bias)
        return recorded_layer_norm(input, self.weight, self.bias, self.eps, record)

    def task_norm(self, task: int) -> nn.LayerNorm:
        """Return the norm of one task as a plain one with copies."""
        return plain_norm(self.weight, self.bias, self.eps)


class NoNorm(nn.Identity):
    """Identity in the place of a norm."""

    def forward(self, input: Tensor, task_id: TaskIds | None = None) -> Tensor:
        """``[..., F]`` to the same tensor; the task id is accepted and ignored."""
        return input


def plain_norm(weight: Tensor, bias: Tensor, eps: float) -> nn.LayerNorm:
    """LayerNorm with copies of ``weight [F]`` and ``bias [F]``."""
    norm = nn.LayerNorm(len(weight), eps, device=weight.device, dtype=weight.dtype)
    norm.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    return norm


#: Makes the norm of a hidden layer of some size.
NormMaker = Callable[[int], nn.Module]


def hidden_norms(hidden: Sequence[int], layer_norm: bool, norm: NormMaker = SharedLayerNorm) -> nn.ModuleList:
    """Modules between the hidden layers and their activations: a LayerNorm each (Ba et al. 2016), or nothing."""
    return nn.ModuleList(norm(size) if layer_norm else NoNorm() for size in hidden)


class TaskMLP(nn.Module):
    """Task layers with an activation between them.

    Args:
        sizes: input, hidden and output sizes.
        layer: makes a task layer ``layer(x, task_ids, temperature)`` from its input and output size.
        activation: a key of ``ACTIVATIONS``.
        temperature: factor on the sigma of every posterior.
        layer_norm: normalise each hidden layer's output before its activation (Ba et al. 2016).
        norm: makes such a norm ``norm(x, task_ids)``; unless given, all tasks share its scale and offset.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        layer: Callable[[int, int], nn.Module],
        activation: str,
        temperature: float = 1.0,
        layer_norm: bool = False,
        norm: NormMaker = SharedLayerNorm,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(a, b) for a, b in pairwise(sizes))
        self.activation = ACTIVATIONS[activation]
        self.temperature = temperature
        self.norms = hidden_norms(sizes[1:-1], layer_norm, norm)

    def forward(self, x: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, F]`` to ``[T, B, G]``, or any layout the layers take."""
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = self.activation(norm(layer(x, task_ids, self.temperature), task_ids))
        return self.layers[-1](x, task_ids, self.temperature)  # type: ignore[no-any-return]


class BroNet(nn.Module):
    """A wide residual network that stays trainable as it grows (Nauman et al. 2024, section 4, "BroNet").

    ``x_0 = act(norm(layer(x)))``, then for every further hidden size ``x_{k+1} = x_k + norm(layer(act(norm(layer(
    x_k)))))``, then the head. Two hidden sizes are thus one residual block of two layers.

    Args:
        sizes: input, hidden and output sizes; the hidden ones are all the same.
        layer: makes a task layer ``layer(x, task_ids, temperature)`` from its input and output size.
        activation: a key of ``ACTIVATIONS``.
        temperature: factor on the sigma of every posterior.
        norm: makes the norm of a layer, see :class:`TaskMLP`.

    Raises:
        ValueError: there is no hidden size, or they differ.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        layer: Callable[[int, int], nn.Module],
        activation: str,
        temperature: float = 1.0,
        norm: NormMaker = SharedLayerNorm,
    ) -> None:
        super().__init__()
        inputs, *hidden, outputs = sizes
        if len(set(hidden)) != 1:
            raise ValueError(f"hidden sizes are {hidden}; residual blocks need at least one, and all the same")
        widths = [inputs, hidden[0], *[hidden[0]] * (2 * (len(hidden) - 1)), outputs]
        self.layers = nn.ModuleList(layer(a, b) for a, b in pairwise(widths))
        self.norms = hidden_norms(widths[1:-1], True, norm)
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
        y = self.layers[index](x, task_ids, self.temperature)
        return self.norms[index](y, task_ids)  # type: ignore[no-any-return]


class StackedLinear(nn.Module):
    """``y_m = x_m W_m^T + b_m`` for ``M`` copies; each starts as ``torch.nn.Linear`` does.

    Attributes:
        weights: ``[M, G, F]``; biases: ``[M, G]``. All are shared by the tasks.
        stacks_copies: dim 0 of the parameters counts copies of a layer.
    """

    stacks_copies = True

    def __init__(self, copies: int, in_features: int, out_features: int) -> None:
        super().__init__()
        check_positive(copies=copies, in_features=in_features, out_features=out_features)
        self.weights, biases = linear_parameters(in_features, out_features, bias=True, copies=(copies,))
        assert biases is not None
        self.biases = biases

    def linear_parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """The weights ``[M, G, F]`` and the biases ``[M, G]``."""
        return self.weights, self.biases

    def forward(self, x: Tensor) -> Tensor:
        """``[M, N, F]``, an input per copy, or ``[N, F]``, one input for all, to ``[M, N, G]``."""
        if x.dim() == 2:
            y = linear(x, self.weights.flatten(0, 1), self.biases.flatten())
            return y.reshape(x.shape[0], *self.biases.shape).transpose(0, 1)
        return torch.baddbmm(self.biases.unsqueeze(1), x, self.weights.transpose(1, 2))

    def extra_repr(self) -> str:
        copies, out_features, in_features = self.weights.shape
        return f"copies={copies}, in_features={in_features}, out_features={out_features}"


class StackedNorm(nn.Module):
    """LayerNorm (Ba et al. 2016) with a scale and an offset of its own for every copy, both ``[M, H]``."""

    stacks_copies = True

    def __init__(self, copies: int, features: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.ones(copies, features))
        self.offsets = nn.Parameter(torch.zeros(copies, features))

    def forward(self, x: Tensor) -> Tensor:
        """``[M, N, H]`` to as much."""
        normal = F.layer_norm(x, x.shape[-1:])
        return torch.addcmul(self.offsets.unsqueeze(1), normal, self.scales.unsqueeze(1))


class TaskNorm(nn.Module):
    """LayerNorm with a scale and an offset of its own for every task, both ``[T, H]``."""

    per_task_parameters = ("scales", "offsets")

    def __init__(self, num_tasks: int, features: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.ones(num_tasks, features))
        self.offsets = nn.Parameter(torch.zeros(num_tasks, features))
        self.register_load_state_dict_pre_hook(_give_every_task_its_norm)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, task_id: TaskIds) -> Tensor:
        """Normalise by each row's own task; layouts and errors as in ``VarShareLoRALayer.forward``."""
        rows = task_rows(x, task_id, len(self.scales))
        normal = F.layer_norm(rows.x, x.shape[-1:])
        scales, offsets = (rows.select(own).unsqueeze(1) for own in (self.scales, self.offsets))
        return rows.restore(torch.addcmul(offsets, normal, scales))

    def task_norm(self, task: int) -> nn.LayerNorm:
        """Return the norm of one task as a plain one with copies."""
        return plain_norm(self.scales[task], self.offsets[task], 1e-5)


def _give_every_task_its_norm(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Take checkpoints of a time when the tasks shared the norm."""
    for former, name in (("weight", "scales"), ("bias", "offsets")):
        if prefix + former in state:
            state[prefix + name] = state.pop(prefix + former).expand_as(module.get_parameter(name))


def stacked_norms(copies: int, hidden: Sequence[int], layer_norm: bool) -> nn.ModuleList:
    """Modules between stacked hidden layers and their activations: a norm per copy, or nothing."""
    return nn.ModuleList(StackedNorm(copies, size) if layer_norm else nn.Identity() for size in hidden)


class StackedMLP(nn.Module):
    """``M`` multilayer perceptrons on the same input, with no activation at the end.

    Args:
        copies: ``M``.
        sizes: input, hidden and output sizes.
        activation: a key of ``ACTIVATIONS``.
        layer_norm: normalise each hidden layer's output before its activation.
    """

    def __init__(self, copies: int, sizes: Sequence[int], activation: str, layer_norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(StackedLinear(copies, a, b) for a, b in pairwise(sizes))
        self.norms = stacked_norms(copies, sizes[1:-1], layer_norm)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """``[N, F]`` to ``[M, N, G]``."""
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = self.activation(norm(layer(x)))
        y: Tensor = self.layers[-1](x)
        return y
