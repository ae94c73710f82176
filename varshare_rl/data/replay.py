"""Replay memory with one row per transition and one gather per batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varshare_rl.types import Transition, Tree


@dataclass(frozen=True)
class ReplayBatch:
    """A batch of transitions, ``B`` of every task. All float32 views of one gathered tensor."""

    obs: Tensor  # [T, B, F]
    action: Tensor  # [T, B, A]
    reward: Tensor  # [T, B]
    terminated: Tensor  # [T, B] 0 or 1
    next_obs: Tensor  # [T, B, F]


class ReplayBuffer:
    """A ring buffer per task, ``[T, capacity, row]``, all tasks equally full.

    A row is ``obs | action | reward | terminated | next_obs``. Truncation is not stored: ``next_obs`` is the
    true successor, so a time limit needs no special case.

    Args:
        num_tasks: ``T``.
        capacity_per_task: transitions kept per task.
        obs_size: ``F``.
        action_size: ``A``.
        device: where the memory lives.
    """

    def __init__(
        self, num_tasks: int, capacity_per_task: int, obs_size: int, action_size: int, device: torch.device
    ) -> None:
        self.num_tasks, self.capacity = num_tasks, capacity_per_task
        self.sizes = [obs_size, action_size, 1, 1, obs_size]
        self.rows = torch.zeros(num_tasks, capacity_per_task, sum(self.sizes), device=device)
        self.offsets = (torch.arange(num_tasks, device=device) * capacity_per_task).unsqueeze(1)
        self.position = 0
        self.filled = 0

    def __len__(self) -> int:
        """Transitions held per task."""
        return self.filled

    def add(self, transition: Transition) -> None:
        """Append one vector step: ``E`` transitions of every task."""
        parts = (
            transition.obs,
            transition.action,
            transition.reward.unsqueeze(-1),
            transition.terminated.unsqueeze(-1).float(),
            transition.next_obs,
        )
        new = torch.cat(parts, dim=-1)  # [T, E, row]
        count = new.shape[1]
        first = min(count, self.capacity - self.position)
        self.rows[:, self.position : self.position + first] = new[:, :first]
        if first < count:
            self.rows[:, : count - first] = new[:, first:]
        self.position = (self.position + count) % self.capacity
        self.filled = min(self.filled + count, self.capacity)

    def sample(self, batch_per_task: int, tasks: Tensor | None = None) -> ReplayBatch:
        """Draw transitions of every task, or of ``tasks [K]``, uniformly and with replacement."""
        offsets = self.offsets if tasks is None else self.offsets[tasks.to(self.offsets.device)]
        shape = (len(offsets), batch_per_task)
        index = torch.randint(self.filled, shape, device=self.rows.device) + offsets
        rows = self.rows.view(-1, self.rows.shape[-1]).index_select(0, index.view(-1)).view(*shape, -1)
        obs, action, reward, terminated, next_obs = torch.split(rows, self.sizes, dim=-1)
        return ReplayBatch(obs, action, reward.squeeze(-1), terminated.squeeze(-1), next_obs)

    def state(self) -> Tree:
        """The filled part of the memory and the place to go on writing."""
        return {"rows": self.rows[:, : self.filled], "position": self.position, "filled": self.filled}

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.filled, self.position = state["filled"], state["position"]
        self.rows[:, : self.filled] = state["rows"].to(self.rows.device)
