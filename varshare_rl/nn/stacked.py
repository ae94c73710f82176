"""Several layers of one size in one batched product: the experts and modules of some architectures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varshare_rl.nn.initial import check_positive, linear_parameters
from varshare_rl.ops.activations import ACTIVATIONS
from varshare_rl.ops.linear import linear


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

    def forward(self, x: Tensor) -> Tensor:
        """``[M, N, F]``, an input per copy, or ``[N, F]``, one input for all, to ``[M, N, G]``."""
        if x.dim() == 2:
            y = linear(x, self.weights.flatten(0, 1), self.biases.flatten())
            return y.reshape(len(x), *self.biases.shape).transpose(0, 1)
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


def stacked_norms(copies: int, hidden: Sequence[int], layer_norm: bool) -> nn.ModuleList:
    """What stands between each stacked hidden layer and its activation: a norm per copy, or nothing."""
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
