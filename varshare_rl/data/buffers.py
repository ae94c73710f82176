"""Transitions to learn from: the rollout of PPO, and the replay buffer of SAC."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from varshare_rl.errors import UserError
from varshare_rl.ranks import ALONE, Ranks
from varshare_rl.state import Stateful
from varshare_rl.types import Transition


@dataclass(frozen=True)
class RolloutStep:
    """One vector step as PPO keeps it."""

    obs: Tensor  # [T, E, F] as the policy saw it
    raw_action: Tensor  # [T, E, A] before squashing, or [T, E] int64
    log_prob: Tensor  # [T, E]
    reward: Tensor  # [T, E]
    terminated: Tensor  # [T, E] bool
    truncated: Tensor  # [T, E] bool
    next_obs: Tensor  # [T, E, F]
    draws: Tensor | None = None  # what it takes to replay the policy's draws of weights, [T, E, ...]


class Rollout(Stateful):
    """Preallocated ``[T, S, E, ...]`` storage of ``S`` vector steps, by the names of :class:`RolloutStep`."""

    state_fields = ("position", "steps")

    def __init__(self, vector_steps: int, device: torch.device | str = "cpu") -> None:
        self.vector_steps, self.device = vector_steps, device
        self.position = 0
        self.fields: dict[str, Tensor] = {}

    def add(self, step: RolloutStep) -> None:
        """Append one vector step."""
        for name, value in vars(step).items():
            if value is None:
                continue
            if name not in self.fields:
                self.fields[name] = self._storage(value.unsqueeze(1))
            self.fields[name][:, self.position] = value
        self.position += 1

    def truncate(self, ended: Tensor) -> None:
        """Let the episodes ``ended [T, E]`` go no further than the last step."""
        if self.position:
            last = {name: self.fields[name][:, self.position - 1] for name in ("terminated", "truncated")}
            last["truncated"] |= ended & ~last["terminated"]

    @property
    def full(self) -> bool:
        """True when all vector steps are there."""
        return self.position == self.vector_steps

    @property
    def steps(self) -> dict[str, Tensor]:
        """The steps so far, ``[T, position, E, ...]``."""
        return {name: value[:, : self.position] for name, value in self.fields.items()}

    @steps.setter
    def steps(self, steps: dict[str, Tensor]) -> None:
        self.fields = {name: self._storage(value) for name, value in steps.items()}
        for name, value in steps.items():
            self.fields[name][:, : self.position] = value.to(self.device)

    def _storage(self, like: Tensor) -> Tensor:
        """Zeros for all vector steps of what is ``[T, steps, E, ...]``."""
        shape = (like.shape[0], self.vector_steps, *like.shape[2:])
        return torch.zeros(shape, dtype=like.dtype, device=self.device)


@dataclass(frozen=True)
class ReplayBatch:
    """A batch of transitions, ``B`` of every task. All float32 views of one gathered tensor."""

    obs: Tensor  # [T, B, F]
    action: Tensor  # [T, B, A]
    reward: Tensor  # [T, B]
    terminated: Tensor  # [T, B] 0 or 1
    next_obs: Tensor  # [T, B, F]


class ReplayBuffer(Stateful):
    """A ring buffer per task, ``[T, capacity, row]``, all tasks equally full; one gather makes a batch.

    A row is ``obs | action | reward | terminated | next_obs``. Truncation is not stored: ``next_obs`` is the
    true successor, so a time limit needs no special case.

    Args:
        num_tasks: ``T``.
        capacity_per_task: transitions kept per task.
        obs_size: ``F``.
        action_size: ``A``.
        device: where the memory lives.
        folder: of a file that the memory is mapped to, which is gone with the process; None: plain memory.
        ranks: each of them is given all transitions and holds every ``size``-th; batches are of those of all.
    """

    state_fields = ("position", "filled", "rows=filled_rows")

    def __init__(
        self,
        num_tasks: int,
        capacity_per_task: int,
        obs_size: int,
        action_size: int,
        device: torch.device,
        folder: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.num_tasks, self.capacity, self.ranks = num_tasks, capacity_per_task, ranks
        self.folder, self.device = folder, device if folder is None else torch.device("cpu")
        held = self._held(capacity_per_task)
        self.sizes = [obs_size, action_size, 1, 1, obs_size]
        self.shape = (num_tasks, held, sum(self.sizes))
        self.batch_device = device
        self.offsets = (torch.arange(num_tasks, device=self.device) * held).unsqueeze(1)
        self.position = 0
        self.filled = 0

    def __len__(self) -> int:
        """Return the number of transitions held per task."""
        return self.filled

    @cached_property
    def rows(self) -> Tensor:
        """The memory, ``[T, capacity, row]``; made at its first use, as an agent that only acts has none.

        Raises:
            UserError: the folder cannot hold it.
        """
        if self.folder is None:
            return torch.zeros(self.shape, device=self.device)
        size = 4 * math.prod(self.shape)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a page that finds no room later would end the process
                return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=self.shape))
        except OSError as error:
            raise UserError(
                f"algorithm.replay_folder={self.folder} cannot hold {size / 1e9:,.1f} GB ({error.strerror})"
            ) from error

    @property
    def filled_rows(self) -> list[Tensor]:
        """The filled part of the memory, ``[filled, row]`` for every task, views that need no copy."""
        return list(self.rows[:, : self._held(self.filled)])

    @filled_rows.setter
    def filled_rows(self, rows: list[Tensor]) -> None:
        for held, saved in zip(self.rows, rows, strict=True):
            held[: self._held(self.filled)] = saved

    def add(self, transition: Transition) -> None:
        """Append one vector step: ``E`` transitions of every task."""
        parts = (
            transition.obs,
            transition.action,
            transition.reward.unsqueeze(-1),
            transition.terminated.unsqueeze(-1).float(),
            transition.next_obs,
        )
        new = torch.cat(parts, dim=-1).to(self.device)  # [T, E, row]
        count = new.shape[1]
        first = min(count, self.capacity - self.position)
        self._put(self.position, new[:, :first])
        if first < count:
            self._put(0, new[:, first:])
        self.position = (self.position + count) % self.capacity
        self.filled = min(self.filled + count, self.capacity)

    def sample(self, batch_per_task: int, task_ids: Tensor | None = None) -> ReplayBatch:
        """Draw transitions of every task, or of ``task_ids [K]``, uniformly and with replacement."""
        offsets = self.offsets if task_ids is None else self.offsets[task_ids.to(self.device)]
        shape = (len(offsets), batch_per_task)
        index = torch.randint(self.filled, shape, device=self.device)
        size, rank = self.ranks.size, self.ranks.rank
        places = index if size == 1 else (index // size).clamp_max(self.shape[1] - 1)
        rows = self.rows.view(-1, self.shape[-1]).index_select(0, (places + offsets).view(-1)).view(*shape, -1)
        rows = rows.to(self.batch_device)
        if size > 1:
            rows = self.ranks.unite(torch.where((index % size == rank).unsqueeze(-1).to(rows.device), rows, 0.0))
        obs, action, reward, terminated, next_obs = torch.split(rows, self.sizes, dim=-1)
        return ReplayBatch(obs, action, reward.squeeze(-1), terminated.squeeze(-1), next_obs)

    def _put(self, position: int, rows: Tensor) -> None:
        """Write ``rows [T, K, row]`` from ``position`` of the ring on, as far as they are this rank's."""
        own = rows[:, (self.ranks.rank - position) % self.ranks.size :: self.ranks.size]
        first = self._held(position)
        self.rows[:, first : first + own.shape[1]] = own

    def _held(self, positions: int) -> int:
        """Return the number of this rank's among the first positions of the ring."""
        return len(range(self.ranks.rank, positions, self.ranks.size))
