"""A trunk that all tasks share and an output layer of its own for every task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from varshare_rl.nn.independent import IndependentLayer
from varshare_rl.nn.mlp import TaskMLP
from varshare_rl.nn.options import ArchitectureOptions, Posterior
from varshare_rl.nn.shared import SharedLayer


@dataclass
class MultiHead(ArchitectureOptions):
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
