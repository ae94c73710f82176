"""PaCo: every task's parameters are its own combination of a few sets of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varshare_rl.fields import bounded
from varshare_rl.nn.config import NetworkConfig, Posterior
from varshare_rl.nn.layer import check_positive
from varshare_rl.nn.mlp import ACTIVATIONS, StackedLinear, hidden_norms
from varshare_rl.nn.task_rows import TaskIds, task_rows
from varshare_rl.registry import register


class PaCoNetwork(nn.Module):
    """An MLP with the parameters ``theta_i = sum_k compositions[i, k] Phi_k`` for task ``i``, heads included.

    Attributes:
        compositions: ``[T, S]``, one row for all layers of a task; layers: the ``S`` sets, layer by layer.
    """

    per_task_parameters = ("compositions",)

    def __init__(
        self, sizes: list[int], num_tasks: int, parameter_sets: int, activation: str, layer_norm: bool
    ) -> None:
        super().__init__()
        check_positive(num_tasks=num_tasks, parameter_sets=parameter_sets)
        self.num_tasks = num_tasks
        self.layers = nn.ModuleList(StackedLinear(parameter_sets, a, b) for a, b in pairwise(sizes))
        self.norms = hidden_norms(sizes[1:-1], layer_norm)
        self.compositions = nn.Parameter(F.normalize(torch.randn(num_tasks, parameter_sets), dim=-1))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, F]`` to ``[T, B, G]``; other layouts and errors as in ``VarShareLoRALayer.forward``."""
        rows = task_rows(x, task_ids, self.num_tasks)
        composition = rows.select(self.compositions)
        h = rows.x
        for layer, norm in zip(self.layers, self.norms, strict=False):
            h = self.activation(norm(_composed(layer, composition, h)))
        return rows.restore(_composed(self.layers[-1], composition, h))


def _composed(layer: nn.Module, composition: Tensor, x: Tensor) -> Tensor:
    """``x [K, B, F]`` through the linear layers that ``composition [K, S]`` makes of the sets, ``[K, B, G]``."""
    assert isinstance(layer, StackedLinear)
    weights = torch.tensordot(composition, layer.weights, dims=1)  # [K, G, F]
    return torch.baddbmm((composition @ layer.biases).unsqueeze(1), x, weights.transpose(1, 2))


@register("network", "paco")
@dataclass
class PaCoConfig(NetworkConfig):
    """``network=paco``: parameter-compositional multi-task RL (Sun et al. 2022).

    Parameters are combined, not outputs: a task runs one network whose weights and biases are its combination of
    ``parameter_sets`` shared ones. Rows of ``compositions`` start on the unit sphere and sets start
    independently, so composed weights start at the scale of ``torch.nn.Linear``; afterwards nothing holds them
    there.

    Deviations: actor and critics have compositions of their own (one for all in the paper); a task whose loss
    explodes is not masked, nor its row reset from the others. Counted as active are all sets and the task's own
    row, since its weights are made of every set; the composed network alone is as large as one set.
    """

    name: str = "paco"
    parameter_sets: int = bounded(5, least=1)
    "Sets of parameters that every task combines."

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> PaCoNetwork:
        """A compositional MLP for ``num_tasks`` tasks."""
        sizes = [in_features, *self.hidden, out_features]
        return PaCoNetwork(sizes, num_tasks, self.parameter_sets, self.activation, self.layer_norm)
