"""MOORE: every task's features are its own mixture of experts that are made orthonormal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.config import NetworkConfig, Posterior
from varshare_rl.nn.independent import IndependentLayer
from varshare_rl.nn.mlp import StackedMLP, hidden_norms
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.nn.task_rows import TaskIds, task_rows
from varshare_rl.registry import register


def orthonormalize(vectors: Tensor) -> Tensor:
    """Gram-Schmidt over the first dimension: ``[E, N, H]`` to ``E`` orthonormal vectors for each of ``N`` rows.

    ``u_e = w / ||w||``, where ``w`` is ``v_e`` after ``w <- w - <w, u_f> u_f`` for all ``f < e``. That is gone
    through twice, which keeps the result orthogonal to rounding when ``v_e`` is nearly in the span of the others
    (Giraud et al. 2005). Needs ``E <= H``.
    """
    basis: list[Tensor] = []
    for rest in vectors.unbind(0):
        for known in (*basis, *basis):
            rest = torch.addcmul(rest, torch.linalg.vecdot(rest, known).unsqueeze(-1), known, value=-1)
        basis.append(F.normalize(rest, dim=-1))
    return torch.stack(basis)


class MOORENetwork(nn.Module):
    """``y = head_i(tanh(sum_e mixtures[i, e] u_e(x)))``, with ``u_e`` the orthonormal outputs of the experts.

    Attributes:
        mixtures: ``[T, E]``; experts; norm: of the mixture, with ``layer_norm``; head.
    """

    per_task_parameters = ("mixtures",)

    def __init__(
        self, sizes: list[int], num_tasks: int, experts: int, multi_head: bool, activation: str, layer_norm: bool
    ) -> None:
        super().__init__()
        *trunk, outputs = sizes
        self.num_tasks = num_tasks
        self.experts = StackedMLP(experts, trunk, activation, layer_norm)
        bound = math.sqrt(6.0 / (num_tasks + experts))  # Xavier's, of a linear map from a one-hot task
        self.mixtures = nn.Parameter(torch.empty(num_tasks, experts).uniform_(-bound, bound))
        (self.norm,) = hidden_norms(trunk[-1:], layer_norm)
        self.head = (
            IndependentLayer(trunk[-1], outputs, num_tasks) if multi_head else SharedLayer(trunk[-1], outputs)
        )

    def forward(self, x: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, F]`` to ``[T, B, G]``; other layouts and errors as in ``VarShareLoRALayer.forward``."""
        rows = task_rows(x, task_ids, self.num_tasks)
        experts = orthonormalize(self.experts(rows.x.flatten(0, 1)))  # [E, K * B, H]
        experts = experts.reshape(len(experts), *rows.x.shape[:2], -1)
        mixed = torch.einsum("ke,ekbh->kbh", rows.select(self.mixtures), experts)
        y: Tensor = self.head(rows.restore(torch.tanh(self.norm(mixed))), task_ids)
        return y


@register("network", "moore")
@dataclass
class MOOREConfig(NetworkConfig):
    """``network=moore``: mixture of orthogonal experts (Hendawy et al. 2024).

    Every expert is an MLP of the sizes ``hidden`` without an activation at its end. Their outputs are made
    orthonormal for every row by Gram-Schmidt, weighted by the task, and put through tanh, as the paper does on
    Meta-World; a head per task follows, or with ``multi_head=false`` one head for all.

    Deviations: the single head is not given the task beside the features; with ``layer_norm``, which the paper does
    not have, every expert has its own norms and the mixture one too. Active are all experts, since all of them run
    for every task, the task's own mixture and its own head.

    Raises:
        UserError: there is no hidden layer, or the last one is narrower than there are experts.
    """

    name: str = "moore"
    experts: int = bounded(4, least=1)
    "Experts whose outputs are made orthogonal."
    multi_head: bool = True
    "A head for every task; otherwise one for all."

    def least_width(self) -> int:
        """As many features as experts: in fewer dimensions they cannot be orthogonal."""
        return self.experts

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> MOORENetwork:
        """A mixture of experts for ``num_tasks`` tasks."""
        self.require_hidden()
        if self.hidden[-1] < self.experts:
            raise UserError(
                f"network.experts is {self.experts}; so many features cannot be orthogonal in the last hidden "
                f"layer's {self.hidden[-1]} dimensions, so it must be at most that"
            )
        sizes = [in_features, *self.hidden, out_features]
        return MOORENetwork(sizes, num_tasks, self.experts, self.multi_head, self.activation, self.layer_norm)
