"""Noise of actions that goes on from step to step, so that a policy tries directions and not tremors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from varshare_rl.state import Stateful
from varshare_rl.types import Tree


class ActionNoise(Stateful):
    """Standard normal noise ``e_t = c e_{t-1} + sqrt(1 - c^2) n_t`` within an episode, ``n_t`` white.

    An autoregressive process of first order (Korenkevych et al. 2019) whose marginals are those of white noise, so
    that the policy's probability of an action stays that of its Gaussian, as with coloured noise (Hollenstein,
    Martius and Piater 2024).

    Args:
        correlation: ``c`` between neighbouring steps, at least 0 and below 1; 0: white, which nothing is kept of.
        shape: ``T, E, A``.
        device: of the noise.
    """

    state_fields = ("value", "going_on")

    def __init__(self, correlation: float, shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.correlation, self.shape = correlation, shape
        kept = shape if correlation else (0, 0, 0)
        self.value = torch.zeros(kept, device=device)  # of the latest step
        self.going_on = torch.zeros(kept[:2], dtype=torch.bool, device=device)  # its episode has not ended
        self._acted = 0  # environments of every task that have acted in this vector step

    def like(self, envs_per_task: int) -> ActionNoise:
        """Return fresh noise of the same kind for another number of environments of every task."""
        num_tasks, _, action_size = self.shape
        return ActionNoise(self.correlation, (num_tasks, envs_per_task, action_size), self.value.device)

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave; noise of another shape, where a run was white before, begins anew."""
        if state["value"].shape == self.value.shape:
            super().load_state(state)

    def draw(self, envs: int) -> Tensor | None:
        """Return the noise of the next ``envs`` environments of every task, ``[T, envs, A]``; None: white noise."""
        if not self.correlation:
            return None
        chosen = slice(self._acted, self._acted + envs)
        self._acted += envs
        before, fresh = self.value[:, chosen], torch.randn_like(self.value[:, chosen])
        follows = self.correlation * before + math.sqrt(1.0 - self.correlation**2) * fresh
        self.value[:, chosen] = noise = torch.where(self.going_on[:, chosen].unsqueeze(-1), follows, fresh)
        return noise

    def record(self, done: Tensor) -> None:
        """End a vector step, with ``done [T, E]``; noise begins anew in new episodes, and if none was drawn."""
        drawn, self._acted = self._acted > 0, 0
        if self.correlation:
            self.going_on = ~done & drawn

    def end(self, ended: Tensor) -> None:
        """Take note of further episodes that have ended, ``[T, E]``."""
        if self.correlation:
            self.going_on &= ~ended
