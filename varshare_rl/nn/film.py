"""FiLM: one network whose hidden features every task scales and shifts in its own way."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from varshare_rl.nn.config import NetworkConfig, Posterior
from varshare_rl.nn.mlp import ACTIVATIONS, hidden_norms
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.nn.task_rows import TaskIds, TaskRows, task_rows
from varshare_rl.registry import register


class FeatureModulation(nn.Module):
    """``(1 + scales[i]) * h + shifts[i]``, feature by feature; both start at zero.

    Attributes:
        scales, shifts: ``[T, H]``.
    """

    per_task_parameters = ("scales", "shifts")

    def __init__(self, num_tasks: int, features: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.zeros(num_tasks, features))
        self.shifts = nn.Parameter(torch.zeros(num_tasks, features))

    def forward(self, h: Tensor, rows: TaskRows) -> Tensor:
        """Features ``[K, B, H]`` of the tasks of ``rows`` to as many."""
        scales, shifts = (rows.select(own).unsqueeze(1) for own in (self.scales, self.shifts))
        return torch.addcmul(h + shifts, h, scales)


class FiLMNetwork(nn.Module):
    """Shared linear layers; after each hidden one (and its norm) a modulation per task, then the activation."""

    def __init__(self, sizes: list[int], num_tasks: int, activation: str, layer_norm: bool) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.layers = nn.ModuleList(SharedLayer(a, b) for a, b in pairwise(sizes))
        self.norms = hidden_norms(sizes[1:-1], layer_norm)
        self.modulations = nn.ModuleList(FeatureModulation(num_tasks, size) for size in sizes[1:-1])
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, F]`` to ``[T, B, G]``; other layouts and errors as in ``VarShareLoRALayer.forward``."""
        rows = task_rows(x, task_ids, self.num_tasks)
        h = rows.x
        for layer, norm, modulation in zip(self.layers, self.norms, self.modulations, strict=False):
            h = self.activation(modulation(norm(layer(h, task_ids)), rows))
        return rows.restore(self.layers[-1](h, task_ids))


@register("network", "film")
@dataclass
class FiLMConfig(NetworkConfig):
    """``network=film``: feature-wise linear modulation (Perez et al. 2018) of every hidden layer by the task.

    As in the paper the modulation stands between the normalisation (if any) and the activation, and is the
    identity at the start. Deviations: the condition is the task's id, for which the paper's generator network is a
    table of scales and shifts; the modulated network is an MLP. Active are the shared layers and the task's own
    scales and shifts.

    Raises:
        UserError: there is no hidden layer.
    """

    name: str = "film"

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> FiLMNetwork:
        """A modulated MLP for ``num_tasks`` tasks."""
        self.require_hidden()
        return FiLMNetwork([in_features, *self.hidden, out_features], num_tasks, self.activation, self.layer_norm)
