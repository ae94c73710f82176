"""CARE: a mixture of encoders that a task's context attends to, and a trunk that is told the context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varshare_rl.fields import bounded
from varshare_rl.nn.config import NetworkConfig, Posterior
from varshare_rl.nn.layer import check_positive
from varshare_rl.nn.mlp import StackedMLP, TaskMLP
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.nn.task_rows import TaskIds, task_rows
from varshare_rl.registry import register


class CARENetwork(nn.Module):
    """``y = trunk([sum_k a_ik z_k(x), c_i])`` with context ``c_i`` and attention ``a_i = softmax(attention(c_i))``.

    Args:
        sizes: input, hidden and output sizes; the hidden ones are the trunk's.
        num_tasks: number of tasks, ``T``.
        experts: number of encoders ``z_k``.
        encoder_width: width of the encoders' two layers.
        context: size of ``c_i`` and width of the two small networks around it.
        activation, layer_norm: of all parts.

    Attributes:
        embeddings: ``[T, context]``, what the paper has a language model's code of the task's description for.
    """

    per_task_parameters = ("embeddings",)

    def __init__(
        self,
        sizes: list[int],
        num_tasks: int,
        experts: int,
        encoder_width: int,
        context: int,
        activation: str,
        layer_norm: bool,
    ) -> None:
        super().__init__()
        check_positive(num_tasks=num_tasks, experts=experts, encoder_width=encoder_width, context=context)
        inputs, *rest = sizes

        def shared(*widths: int) -> TaskMLP:
            return TaskMLP(widths, SharedLayer, activation, layer_norm=layer_norm)

        self.num_tasks = num_tasks
        self.encoders = StackedMLP(experts, [inputs, encoder_width, encoder_width], activation, layer_norm)
        self.embeddings = nn.Parameter(torch.randn(num_tasks, context))
        self.context_encoder = shared(context, context, context)
        self.attention = shared(context, context, experts)
        self.trunk = shared(encoder_width + context, *rest)

    def forward(self, x: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, F]`` to ``[T, B, G]``; other layouts and errors as in ``VarShareLoRALayer.forward``."""
        rows = task_rows(x, task_ids, self.num_tasks)
        context = self.context_encoder(rows.select(self.embeddings), task_ids)  # [K, C]
        attention = self.attention(context.detach(), task_ids).softmax(-1)  # [K, E]
        encodings = self.encoders(rows.x.flatten(0, 1)).unflatten(1, rows.x.shape[:2])  # [E, K, B, H]
        encoding = torch.einsum("ke,ekbh->kbh", attention, encodings)
        beside = context.unsqueeze(1).expand(-1, rows.x.shape[1], -1)
        return rows.restore(self.trunk(torch.cat([encoding, beside], dim=-1), task_ids))


@register("network", "care")
@dataclass
class CAREConfig(NetworkConfig):
    """``network=care``: contextual attention-based representations (Sodhani et al. 2021).

    As in the paper, ``experts`` encoders of two layers are mixed by soft attention from the task's context, no
    gradient runs from the attention into the context, and the trunk is given the mixture with the context beside
    it.

    Deviations: tasks have no descriptions here, so the context encoder reads a learned embedding per task instead
    of a language model's code of the description; the attention's scores are a network of the context alone, as
    in the authors' code, instead of being compared with each encoder's output; actor and critics learn contexts
    of their own. ``hidden`` is the trunk; ``encoder_width`` and ``context`` are sizes of their own and do not
    follow it. Active are all encoders, since all of them run for every task, all other networks, and the task's
    own embedding.
    """

    name: str = "care"
    experts: int = bounded(6, least=1)
    "Encoders that are mixed."
    encoder_width: int = bounded(50, least=1)
    "Width of the encoders' two layers."
    context: int = bounded(50, least=1)
    "Size of every task's context."

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> CARENetwork:
        """A mixture of encoders with a trunk for ``num_tasks`` tasks."""
        return CARENetwork(
            [in_features, *self.hidden, out_features], num_tasks, self.experts, self.encoder_width, self.context,
            self.activation, self.layer_norm,
        )  # fmt: skip
