"""Critics: a state value and twin action values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from varshare_rl.nn.task_rows import TaskIds


class ValueNetwork(nn.Module):
    """State value ``V(obs)``; ``network`` is a task network with one output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, obs: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, F]`` to ``[T, B]``."""
        value: Tensor = self.network(obs, task_ids)
        return value.squeeze(-1)


class TwinQ(nn.Module):
    """Two action values ``Q(obs, action)`` (Fujimoto et al. 2018); ``make`` builds one task network."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList([make(), make()])

    def forward(self, obs: Tensor, action: Tensor, task_ids: TaskIds) -> Tensor:
        """``obs [T, B, F]`` and ``action [T, B, A]`` to both values, ``[2, T, B]``."""
        x = torch.cat([obs, action], dim=-1)
        return torch.stack([network(x, task_ids).squeeze(-1) for network in self.networks])
