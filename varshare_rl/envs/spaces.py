"""A task's own spaces, and the way between them and the common ones that a policy sees.

A policy has one observation size and one number of actions for all tasks. Observations are padded with zeros to
the longest; of the actions a task takes the first ones. Box actions are in [-1, 1] for the policy and are scaled
to the environment's own bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Discrete

from varshare_rl.errors import UserError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TaskSpaces:
    """Native observation and actions of one task: a Box from ``low`` to ``high``, or ``choices`` of a Discrete."""

    obs_size: int
    policy_obs_size: int  # of all tasks of the suite
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dtype: str = "float32"
    choices: int = 0  # 0: actions are a Box
    start: int = 0  # the number of a Discrete's first choice

    @staticmethod
    def of(observation_space: Any, action_space: Any, policy_obs_size: int | None = None) -> TaskSpaces:
        """Describe an environment's spaces. Raises UserError for kinds that no policy here can use."""
        if not isinstance(observation_space, Box) or len(observation_space.shape) != 1:
            raise UserError(
                f"observes {observation_space}: only Box vectors of one dimension are supported; wrap it, for "
                "example in gymnasium.wrappers.FlattenObservation"
            )
        size = observation_space.shape[0]
        padded = size if policy_obs_size is None else policy_obs_size
        if isinstance(action_space, Discrete):
            return TaskSpaces(size, padded, choices=int(action_space.n), start=int(action_space.start))
        if isinstance(action_space, Box) and len(action_space.shape) == 1 and action_space.is_bounded():
            low, high = (tuple(bound.tolist()) for bound in (action_space.low, action_space.high))
            return TaskSpaces(size, padded, low, high, str(action_space.dtype))
        raise UserError(f"acts in {action_space}: only Discrete and bounded Box vectors are supported; wrap it")

    @property
    def discrete(self) -> bool:
        """Return True for choices, False for a Box."""
        return self.choices > 0

    @property
    def action_size(self) -> int:
        """Number of dimensions or choices."""
        return self.choices or len(self.low)

    @cached_property
    def action_dtype(self) -> np.dtype[Any]:
        """Type of a Box's numbers."""
        return np.dtype(self.dtype)

    @cached_property
    def centre(self) -> Array:
        """Middle of the bounds, ``[A]``."""
        centre: Array = (np.array(self.high, self.dtype) + np.array(self.low, self.dtype)) / 2
        return centre

    @cached_property
    def half(self) -> Array:
        """Half of the distance between the bounds, ``[A]``."""
        half: Array = (np.array(self.high, self.dtype) - np.array(self.low, self.dtype)) / 2
        return half


def to_policy_observation(obs: Any, spaces: TaskSpaces, out: Array | None = None) -> Array:
    """Pad native observations with zeros: ``[..., obs_size]`` to float32 ``[..., policy_obs_size]``.

    ``out`` (one row, its padding zero already) is written and returned if given: engines step with it.
    Raises UserError for another size.
    """
    if out is None:
        obs = np.asarray(obs)
        if obs.shape[-1:] != (spaces.obs_size,):
            raise UserError(f"an observation has shape {obs.shape}; this task observes {spaces.obs_size} numbers")
        out = np.zeros((*obs.shape[:-1], spaces.policy_obs_size), np.float32)
    out[..., : spaces.obs_size] = obs
    return out


def to_native_action(action: Any, spaces: TaskSpaces) -> Any:
    """Turn a policy's actions into the task's own.

    A Box takes the first dimensions of ``[..., A]``, clipped to [-1, 1] and scaled to its bounds. A Discrete takes
    one choice (and gives an int) or an array of choices. Raises ValueError for a choice that does not exist.
    """
    if not spaces.choices:
        own = np.clip(action[..., : len(spaces.low)], -1.0, 1.0)
        return (spaces.centre + spaces.half * own).astype(spaces.action_dtype)
    if isinstance(action, np.ndarray) and action.ndim:
        return np.array([to_native_action(choice, spaces) for choice in action])
    if not 0 <= action < spaces.choices:
        raise ValueError(f"action {action} does not exist here: this task has actions 0 to {spaces.choices - 1}")
    return spaces.start + int(action)
