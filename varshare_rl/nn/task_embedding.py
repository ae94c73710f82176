"""One network for all tasks, told the task by a learned vector beside the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varshare_rl.fields import bounded
from varshare_rl.nn.config import NetworkConfig, Posterior
from varshare_rl.nn.layer import TaskLayer, check_positive, linear_parameters, plain_linear
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.nn.task_rows import TaskIds, task_rows
from varshare_rl.ops.linear import linear
from varshare_rl.registry import register


class TaskEmbeddingLayer(TaskLayer):
    """Linear layer on the input with the task's embedding appended: ``y = [x, e_i / ||e_i||] theta^T + bias``.

    The longer input is never built: its last columns add the same offset to all rows of a task.

    Args:
        in_features: size of the input, ``F``.
        out_features: size of the output, ``G``.
        num_tasks: number of tasks, ``T``.
        embedding: size of the embedding, ``D``.

    Attributes:
        theta: ``[G, F + D]``; bias: ``[G]``; embeddings: ``[T, D]``, of any length: they are normalised in use.
    """

    per_task_parameters = ("embeddings",)

    def __init__(self, in_features: int, out_features: int, num_tasks: int, embedding: int) -> None:
        super().__init__(in_features, out_features)
        check_positive(num_tasks=num_tasks, embedding=embedding)
        self.theta, self.bias = linear_parameters(in_features + embedding, out_features, bias=True)
        self.embeddings = nn.Parameter(F.normalize(torch.randn(num_tasks, embedding), dim=-1))

    def forward(self, x: Tensor, task_id: TaskIds, temperature: float = 1.0) -> Tensor:
        """Use each row's own task's embedding; layouts and errors as in ``VarShareLoRALayer.forward``."""
        rows = task_rows(x, task_id, self.num_tasks)
        embedding = F.normalize(rows.select(self.embeddings), dim=-1)
        offset = linear(embedding, self.theta[:, self.in_features :], self.bias)  # [K, G]
        return rows.restore(linear(rows.x, self.theta[:, : self.in_features]) + offset.unsqueeze(1))

    def mean_linear(self, task: int) -> nn.Linear:
        assert self.bias is not None
        own, size = F.normalize(self.embeddings[task], dim=-1), self.in_features
        return plain_linear(self.theta[:, :size], self.bias + self.theta[:, size:] @ own)


@register("network", "task_embedding")
@dataclass
class TaskEmbeddingConfig(NetworkConfig):
    """``network=task_embedding``: all weights shared, the task given as a learned embedding of unit norm.

    As in TD-MPC2 (Hansen et al. 2024) and BRC (Nauman et al. 2025). Deviations: the norm is 1 rather than at most
    1, and actor and critics learn embeddings of their own, like all their parameters. ``embedding`` is a size of
    its own and does not follow ``hidden``. Active are the shared weights and the task's own embedding.
    """

    name: str = "task_embedding"
    embedding: int = bounded(32, least=1)
    "Size of every task's embedding."

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        """A network of shared layers, the first of which sees the embedding."""
        embedding = [self.embedding]  # taken by the layer that is made first

        def layer(inputs: int, outputs: int) -> nn.Module:
            if embedding:
                return TaskEmbeddingLayer(inputs, outputs, num_tasks, embedding.pop())
            return SharedLayer(inputs, outputs)

        return self.stack(in_features, out_features, layer)
