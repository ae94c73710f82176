"""On-policy storage for one rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varshare_rl.types import Tree


@dataclass(frozen=True)
class RolloutStep:
    """What PPO keeps of one vector step."""

    obs: Tensor  # [T, E, F] as the policy saw it
    raw_action: Tensor  # [T, E, A] before squashing, or [T, E] int64
    log_prob: Tensor  # [T, E]
    reward: Tensor  # [T, E]
    terminated: Tensor  # [T, E] bool
    truncated: Tensor  # [T, E] bool
    next_obs: Tensor  # [T, E, F]
    draws: Tensor | None = None  # what it takes to replay the policy's draws of weights, [T, E, ...]


class Rollout:
    """Preallocated ``[T, S, E, ...]`` storage of ``S`` vector steps on the device of the observations."""

    def __init__(self, vector_steps: int) -> None:
        self.vector_steps = vector_steps
        self.position = 0
        self.fields: dict[str, Tensor] = {}

    def add(self, step: RolloutStep) -> None:
        """Append one vector step."""
        for name, value in vars(step).items():
            if value is None:
                continue
            if name not in self.fields:
                shape = (value.shape[0], self.vector_steps, *value.shape[1:])
                self.fields[name] = torch.zeros(shape, dtype=value.dtype, device=step.obs.device)
            self.fields[name][:, self.position] = value
        self.position += 1

    @property
    def full(self) -> bool:
        """Whether all vector steps are there."""
        return self.position == self.vector_steps

    def __getitem__(self, name: str) -> Tensor:
        """A field of :class:`RolloutStep` over the whole rollout, ``[T, S, E, ...]``."""
        return self.fields[name]

    def __contains__(self, name: str) -> bool:
        """Whether the steps have this field."""
        return name in self.fields

    def clear(self) -> None:
        """Start over; memory is kept."""
        self.position = 0

    def state(self) -> Tree:
        """The steps so far."""
        steps = {name: value[:, : self.position] for name, value in self.fields.items()}
        return {"position": self.position, "steps": steps}

    def load_state(self, state: Tree, device: torch.device) -> None:
        """Put back what :meth:`state` gave."""
        self.position = state["position"]
        self.fields = {}
        for name, steps in state["steps"].items():
            shape = (steps.shape[0], self.vector_steps, *steps.shape[2:])
            self.fields[name] = torch.zeros(shape, dtype=steps.dtype, device=device)
            self.fields[name][:, : self.position] = steps.to(device)
