"""A network per task with nothing shared, and a shared trunk with a head per task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from varshare_rl.nn.config import NetworkConfig, Posterior
from varshare_rl.nn.layer import TaskLayer, linear_parameters, plain_linear
from varshare_rl.nn.mlp import TaskMLP, TaskNorm
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.nn.task_rows import TaskIds, task_rows
from varshare_rl.ops.task_weights import FullRankWeights
from varshare_rl.registry import register


class IndependentLayer(TaskLayer):
    """Linear layer with a weight ``[T, G, F]`` and a bias ``[T, G]`` of its own for every task."""

    per_task_parameters = ("weights", "biases")

    def __init__(self, in_features: int, out_features: int, num_tasks: int) -> None:
        super().__init__(in_features, out_features)
        self.weights, biases = linear_parameters(in_features, out_features, bias=True, copies=(num_tasks,))
        assert biases is not None
        self.biases = biases

    def forward(self, x: Tensor, task_id: TaskIds, temperature: float = 1.0) -> Tensor:
        """Apply each row's own task's network; layouts and errors as in ``VarShareLoRALayer.forward``."""
        rows = task_rows(x, task_id, self.num_tasks)
        weights = rows.select(self.weights).transpose(1, 2)
        return rows.restore(torch.baddbmm(rows.select(self.biases).unsqueeze(1), rows.x, weights))

    def linear_parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.weights, self.biases

    def mean_linear(self, task: int) -> nn.Linear:
        return plain_linear(self.weights[task], self.biases[task])

    def task_weights(self) -> FullRankWeights:
        """The weights of all tasks, nothing of which is shared; see :mod:`varshare_rl.nn.sharing`."""
        return FullRankWeights(None, self.weights)


@register("network", "independent")
@dataclass
class IndependentConfig(NetworkConfig):
    """``network=independent``: one network per task."""

    name: str = "independent"

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        """A network of batched per-task layers and norms."""

        def layer(inputs: int, outputs: int) -> nn.Module:
            return IndependentLayer(inputs, outputs, num_tasks)

        return self.stack(in_features, out_features, layer, norm=partial(TaskNorm, num_tasks))


@register("network", "multi_head")
@dataclass
class MultiHeadConfig(NetworkConfig):
    """``network=multi_head``: shared hidden layers, a head per task (Caruana 1997; MTMHSAC in Yu et al. 2020).

    Deviation from implementations whose observations carry a one-hot: the trunk is not told the task, only the
    heads differ. Active are the trunk and the task's own head.
    """

    name: str = "multi_head"

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> TaskMLP:
        """An MLP of shared layers whose last one is a layer per task."""
        shared = [True] * len(self.hidden) + [False]

        def layer(inputs: int, outputs: int) -> nn.Module:
            return SharedLayer(inputs, outputs) if shared.pop(0) else IndependentLayer(inputs, outputs, num_tasks)

        sizes = [in_features, *self.hidden, out_features]
        return TaskMLP(sizes, layer, self.activation, layer_norm=self.layer_norm)
