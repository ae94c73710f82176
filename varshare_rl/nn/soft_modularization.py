"""Soft modularization: layers of modules, and for every task and state its own soft routes between them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from varshare_rl.fields import bounded
from varshare_rl.nn.config import NetworkConfig, Posterior
from varshare_rl.nn.layer import check_positive
from varshare_rl.nn.mlp import ACTIVATIONS, StackedLinear, TaskMLP, stacked_norms
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.nn.task_rows import TaskIds, task_rows
from varshare_rl.registry import register


class SoftModularizationNetwork(nn.Module):
    """Modules ``j`` in layers ``l`` with routing probabilities ``p_l`` between layer ``l`` and the next.

    With state features ``f = encoder(x)``, task embedding ``h_i``, gate ``e = f * h_i`` and activation ``s``::

        p_1 = softmax(D_1 s(e)),    p_{l+1} = softmax(D_{l+1} s(U_l p_l * e))      rows of M entries, sum 1
        g_1j = s(f),                g_{l+1, i} = sum_j p_l[i, j] s(W_lj g_lj + b_lj)
        y = head(g_{L+1}),          p_L being a single row

    Attributes:
        embeddings: ``[T, D]``; encoder; modules_by_layer: ``W``; routes: ``D``; conditions: ``U``; head.
    """

    per_task_parameters = ("embeddings",)

    def __init__(
        self, sizes: list[int], num_tasks: int, modules: int, embedding: int, activation: str, layer_norm: bool
    ) -> None:
        super().__init__()
        check_positive(num_tasks=num_tasks, modules=modules, embedding=embedding)
        inputs, *hidden, outputs = sizes
        pairs = modules * modules
        self.num_tasks, self.num_modules = num_tasks, modules
        self.embeddings = nn.Parameter(torch.randn(num_tasks, embedding))
        self.encoder = TaskMLP([inputs, embedding, embedding], SharedLayer, activation, layer_norm=layer_norm)
        self.modules_by_layer = nn.ModuleList(
            StackedLinear(modules, a, b) for a, b in pairwise([embedding, *hidden])
        )
        self.norms = stacked_norms(modules, hidden, layer_norm)
        self.conditions = nn.ModuleList(SharedLayer(pairs, embedding) for _ in hidden[1:])
        self.routes = nn.ModuleList(SharedLayer(embedding, pairs) for _ in hidden[1:])
        self.routes.append(SharedLayer(embedding, modules))
        self.head = SharedLayer(hidden[-1], outputs)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, F]`` to ``[T, B, G]``; other layouts and errors as in ``VarShareLoRALayer.forward``."""
        rows = task_rows(x, task_ids, self.num_tasks)
        features = self.encoder(rows.x, task_ids)
        gate = (features * rows.select(self.embeddings).unsqueeze(1)).flatten(0, 1)
        # Activations may overwrite their argument, and the gate's gradient needs the features: hence the copy.
        h = self.activation(features.flatten(0, 1).clone())
        for layer, norm, routing in zip(self.modules_by_layer, self.norms, self.routing(gate), strict=True):
            out = self.activation(norm(layer(h)))  # [M, N, H]
            h = torch.bmm(routing, out.transpose(0, 1)).transpose(0, 1)  # [M, N, H], in the end [1, N, H]
        return rows.restore(self.head(h[0], task_ids).unflatten(0, rows.x.shape[:2]))

    def routing(self, gate: Tensor) -> list[Tensor]:
        """Routing of every layer for the gates ``e [N, D]``: ``[N, M, M]``, after the last one ``[N, 1, M]``."""
        found: list[Tensor] = []
        for index, route in enumerate(self.routes):
            e = self.conditions[index - 1](found[-1].flatten(1), 0) * gate if found else gate.clone()
            found.append(route(self.activation(e), 0).unflatten(-1, (-1, self.num_modules)).softmax(-1))
        return found


@register("network", "soft_modularization")
@dataclass
class SoftModularizationConfig(NetworkConfig):
    """``network=soft_modularization``: soft modularization (Yang et al. 2020).

    ``hidden`` gives a layer of ``modules`` modules for each entry, of that width; ``embedding`` is the size of the
    state features and the task embedding, null for that of the first layer. The paper has 2 x 2 modules of 256 with
    400 features on MT10 and 4 x 4 on MT50.

    Deviations, where the paper and the authors' code differ: activations come before the routed sum (paper);
    routing is conditioned on the layer before, without skips and without further layers (paper), by its
    probabilities (code); the last layer's outputs are mixed by a row of routing and put through one head (code).
    Loss weights per task are not part of a network. Active is everything but the other tasks' embeddings: all
    modules run for every task.

    Raises:
        UserError: there is no hidden layer.
    """

    name: str = "soft_modularization"
    modules: int = bounded(2, least=1)
    "Modules of every layer."
    embedding: int | None = bounded(None, least=1)
    "Size of the state features and of every task's embedding; null: as wide as the first hidden layer."

    def build(
        self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior
    ) -> SoftModularizationNetwork:
        """A network of routed modules for ``num_tasks`` tasks."""
        self.require_hidden()
        embedding = self.hidden[0] if self.embedding is None else self.embedding
        sizes = [in_features, *self.hidden, out_features]
        return SoftModularizationNetwork(
            sizes, num_tasks, self.modules, embedding, self.activation, self.layer_norm
        )
