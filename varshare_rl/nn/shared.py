"""One network for all tasks, told the task by a one-hot input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from varshare_rl.nn.config import NetworkConfig, Posterior
from varshare_rl.nn.layer import TaskLayer, linear_parameters, plain_linear
from varshare_rl.nn.task_rows import TaskIds, TaskRows, all_tasks, task_rows
from varshare_rl.ops.gradient_record import GradientRecord, Recorder, per_task_offset
from varshare_rl.ops.linear import linear
from varshare_rl.registry import register


class SharedLayer(TaskLayer):
    """Linear layer with the same weight for every task; the task id is accepted and ignored.

    With ``one_hot_tasks > 0`` the layer acts on the input with a one-hot code of the task appended. The
    code is never built: its product with the last columns of ``theta`` is a column of ``theta``.
    """

    bias: nn.Parameter

    def __init__(self, in_features: int, out_features: int, one_hot_tasks: int = 0) -> None:
        super().__init__(in_features, out_features)
        self.one_hot_tasks = one_hot_tasks
        self.theta, bias = linear_parameters(in_features + one_hot_tasks, out_features, bias=True)
        assert bias is not None
        self.bias = bias

    @property
    def num_tasks(self) -> int:
        """Number of tasks of the one-hot code; 0 without one."""
        return self.one_hot_tasks

    def forward(self, x: Tensor, task_id: TaskIds, temperature: float = 1.0) -> Tensor:
        """``x [..., F]`` in any layout to ``[..., G]``."""
        if self.one_hot_tasks == 0:
            return linear(x, self.theta, self.bias, self.record())
        rows = task_rows(x, task_id, self.one_hot_tasks, stacked=False)  # columns are kept for all tasks
        if self.recorder is not None:
            return rows.restore(self._recorded(rows, self.recorder))
        offset = rows.select(self.theta[:, self.in_features :].t() + self.bias)  # [K, G]
        return rows.restore(linear(rows.x, self.theta[:, : self.in_features]).add_(offset.unsqueeze(1)))

    def _recorded(self, rows: TaskRows, recorder: Recorder) -> Tensor:
        """The same output, by functions that can tell the tasks' gradients apart."""
        record = GradientRecord(recorder, self.theta, columns=self.in_features)
        ids = all_tasks(self.one_hot_tasks) if rows.ids is None else rows.ids
        offset = per_task_offset(self.theta, self.bias, self.in_features, ids.to(self.theta.device), recorder)
        return linear(rows.x, self.theta[:, : self.in_features], None, record) + offset.unsqueeze(1)

    def mean_linear(self, task: int) -> nn.Linear:
        hot = self.theta[:, self.in_features + task] if self.one_hot_tasks else 0.0
        return plain_linear(self.theta[:, : self.in_features], self.bias + hot)

    def shared_linear(self) -> nn.Linear:
        return super().shared_linear() if self.one_hot_tasks else plain_linear(self.theta, self.bias)


@register("network", "shared")
@dataclass
class SharedConfig(NetworkConfig):
    """``network=shared``: all weights shared, the task given as a one-hot input."""

    name: str = "shared"

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        """A network of shared layers, the first of which sees the one-hot task."""
        one_hot = [num_tasks]  # taken by the layer that is made first

        def layer(inputs: int, outputs: int) -> nn.Module:
            return SharedLayer(inputs, outputs, one_hot.pop() if one_hot else 0)

        return self.stack(in_features, out_features, layer)
