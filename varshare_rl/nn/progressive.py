"""Columns: a network per task, each of which sees the hidden layers of those before it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varshare_rl.nn.layer import TaskLayer, linear_parameters
from varshare_rl.nn.task_rows import TaskIds
from varshare_rl.ops.linear import linear

#: Standard deviation of the scales of lateral inputs at the start.
INITIAL_SCALE_STD = 0.1

#: Inputs of the layers of the columns before, by the layers' place in their column.
Taps = dict[int, list[Tensor]]


class LateralLayer(TaskLayer):
    """Linear layer of one column with an adapter from the columns before it (Rusu et al. 2016, equation 2).

    ``y = W h + b + U relu(V [s_0 h_0, s_1 h_1, ...])`` with ``h_j`` the input of the layer at the same place of
    column ``j``, and ``s_j`` a learnt number. The first layer and the first column have no adapter.

    Args:
        in_features, out_features: sizes of input and output.
        place: number of the layer in its column.
        earlier: number of columns before this one.
        width: size of the adapter's hidden layer.
        taps: where the columns leave their layers' inputs, in order.
    """

    def __init__(
        self, in_features: int, out_features: int, place: int, earlier: int, width: int, taps: Taps
    ) -> None:
        super().__init__(in_features, out_features)
        self.place, self.taps = place, taps
        self.theta, self.bias = linear_parameters(in_features, out_features, bias=True)
        self.earlier = earlier if place > 0 else 0
        if self.earlier:
            self.scales = nn.Parameter(torch.randn(earlier) * INITIAL_SCALE_STD)
            self.project = linear_parameters(earlier * in_features, width, bias=False)[0]  # V
            self.mix = linear_parameters(width, out_features, bias=False)[0]  # U

    def forward(self, x: Tensor, task_id: TaskIds, temperature: float = 1.0) -> Tensor:
        """``x [..., F]`` to ``[..., G]``; the task id is accepted and ignored."""
        y = linear(x, self.theta, self.bias)
        before = self.taps.setdefault(self.place, [])
        if self.earlier:
            seen = torch.cat([scale * tap for scale, tap in zip(self.scales, before, strict=True)], dim=-1)
            y = y + linear(F.relu(linear(seen, self.project)), self.mix)
        before.append(x)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, earlier={self.earlier}"


class Columns(nn.Module):
    """Networks of one kind side by side; the last one's output is the output.

    Args:
        stack: puts the layers that a maker makes together into a column.
        columns: their number.
        width: size of the adapters' hidden layers.
    """

    def __init__(
        self, stack: Callable[[Callable[[int, int], nn.Module]], nn.Module], columns: int, width: int
    ) -> None:
        super().__init__()
        self.taps: Taps = {}

        def column(earlier: int) -> nn.Module:
            places = count()
            return stack(lambda a, b: LateralLayer(a, b, next(places), earlier, width, self.taps))

        self.columns = nn.ModuleList(column(earlier) for earlier in range(columns))

    def forward(self, x: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, F]`` to ``[T, B, G]``."""
        try:
            for column in self.columns:
                y: Tensor = column(x, task_ids)
        finally:
            self.taps.clear()  # nothing of a pass stays behind: a network is copied and saved between them
        return y
