"""Advantages and temporal-difference targets."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    discount: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) along dimension 1.

    ``delta = reward + discount * (1 - terminated) * next_value - value`` and
    ``advantage_s = delta_s + discount * gae_lambda * (1 - terminated - truncated) * advantage_{s+1}``.
    ``next_value`` is the value of the true successor, so a time limit bootstraps and a real end does not;
    both stop the sum. All arguments ``[T, S, E]`` with ``S`` vector steps; returns ``[T, S, E]``.
    """
    delta = reward + discount * next_value * (~terminated) - value
    carry = discount * gae_lambda * (~(terminated | truncated)).to(delta.dtype)
    advantage = torch.empty_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for step in range(delta.shape[1] - 1, -1, -1):
        running = delta[:, step] + carry[:, step] * running
        advantage[:, step] = running
    return advantage


def td_target(reward: Tensor, next_value: Tensor, terminated: Tensor, discount: float) -> Tensor:
    """One-step target ``reward + discount * (1 - terminated) * next_value``; any equal shapes.

    ``terminated`` is 0 or 1 (float); truncation does not enter, because ``next_value`` is that of the true
    successor.
    """
    return reward + discount * (1.0 - terminated) * next_value
