"""A linear layer whose weights belong to several tasks in turn, entry by entry."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from varshare_rl.nn.layer import TaskLayer, linear_parameters, plain_linear
from varshare_rl.nn.task_rows import TaskIds
from varshare_rl.ops.linear import linear


class PackedLayer(TaskLayer):
    """Linear layer for one task that trains the entries nobody owns (Mallya and Lazebnik 2018, *PackNet*).

    ``W = theta`` where ``trained``, and ``fixed`` elsewhere. As ``theta`` is not looked at elsewhere, nothing that
    an optimiser does to it, by momentum or decay, can move an entry that is owned or given up.
    """

    fixed: Tensor  # [G, F]: the owned entries; 0 where there is none
    trained: Tensor  # [G, F] bool
    pruned: Tensor  # bool: True once this task has given up its share

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.theta, self.bias = linear_parameters(in_features, out_features, bias=True)
        self.register_buffer("fixed", torch.zeros_like(self.theta))
        self.register_buffer("trained", torch.ones_like(self.theta, dtype=torch.bool))
        self.register_buffer("pruned", torch.tensor(False))

    def weight(self) -> Tensor:
        """``W [G, F]``."""
        return torch.where(self.trained, self.theta, self.fixed)

    def forward(self, x: Tensor, task_id: TaskIds, temperature: float = 1.0) -> Tensor:
        """``x [..., F]`` to ``[..., G]``; the task id is accepted and ignored."""
        return linear(x, self.weight(), self.bias)

    @torch.no_grad()
    def allot(self, free: Tensor) -> None:
        """Train the ``free [G, F]`` (bool) entries of ``theta`` and hold the others as they are."""
        self.trained = torch.empty_like(self.trained).copy_(free)
        self.fixed = self.theta.masked_fill(self.trained, 0.0)
        self.pruned = torch.zeros_like(self.pruned)

    @torch.no_grad()
    def prune(self, share: float) -> None:
        """Go on with the largest ``share`` of the trained entries, at least one; the others are 0 from now on.

        Once per task; later calls change nothing.
        """
        if bool(self.pruned):
            return
        count = math.ceil(share * int(self.trained.sum()))
        magnitude = self.theta.abs().masked_fill(~self.trained, -1.0).flatten()
        largest = torch.zeros_like(magnitude, dtype=torch.bool)
        largest[magnitude.topk(count).indices] = True
        self.trained, self.pruned = largest.view_as(self.trained), torch.ones_like(self.pruned)
        self.theta.mul_(self.trained)  # copies that follow theta alone, such as target networks, get to 0 as well

    def mean_linear(self, task: int) -> nn.Linear:
        return plain_linear(self.weight(), self.bias)
