"""Advantages and temporal-difference targets."""

from __future__ import annotations

import numpy as np
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
    both stop the sum. All arguments ``[T, S, E]`` with ``S`` vector steps; returns ``[T, S, E]``, without a graph.

    The sum runs on the CPU in numpy, whose operations on a few numbers cost a fraction of torch's.
    """
    delta = reward + discount * next_value * (~terminated) - value
    carry = discount * gae_lambda * (~(terminated | truncated)).to(delta.dtype)
    by_step = delta.detach().transpose(0, 1).cpu().contiguous()  # in place: delta_s becomes advantage_s
    advantages, carries = by_step.numpy(), carry.transpose(0, 1).cpu().contiguous().numpy()
    next_action = np.zeros_like(advantages[0])
    for advantage, carried in zip(advantages[::-1], carries[::-1], strict=True):
        advantage += carried * next_action
        next_action = advantage
    return by_step.transpose(0, 1).to(delta.device).contiguous()


def td_target(reward: Tensor, next_value: Tensor, terminated: Tensor, discount: float) -> Tensor:
    """One-step target ``reward + discount * (1 - terminated) * next_value``; any equal shapes.

    ``terminated`` is 0 or 1 (float); truncation does not enter, because ``next_value`` is that of the true
    successor.
    """
    return reward + discount * (1.0 - terminated) * next_value
