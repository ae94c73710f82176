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
            raise UserError(f"observes {_shown(observation_space)}: only Box vectors are learnt from; {_FLATTEN}")
        size = observation_space.shape[0]
        if size == 0:
            raise UserError(f"observes {_shown(observation_space)}, which is empty: there is nothing to learn from")
        padded = size if policy_obs_size is None else policy_obs_size
        if isinstance(action_space, Discrete):
            return TaskSpaces(size, padded, choices=int(action_space.n), start=int(action_space.start))
        if not isinstance(action_space, Box) or len(action_space.shape) != 1:
            raise UserError(f"acts in {_shown(action_space)}: only Discrete and Box vectors are supported; {_WRAP}")
        if action_space.shape[0] == 0:
            raise UserError(f"acts in {_shown(action_space)}, which is empty: there is nothing to decide")
        if not _really_bounded(action_space):
            raise UserError(
                f"acts in {_shown(action_space)}: actions are scaled to the bounds, and these are none; {_WRAP}"
            )
        low, high = (tuple(bound.tolist()) for bound in (action_space.low, action_space.high))
        return TaskSpaces(size, padded, low, high, str(action_space.dtype))

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
    def bounds(self) -> tuple[Array, Array]:
        """Least and largest action, each ``[A]`` in float64."""
        return np.array(self.low, np.float64), np.array(self.high, np.float64)

    @cached_property
    def centre(self) -> Array:
        """Middle of the bounds, ``[A]`` in float64."""
        low, high = self.bounds
        return low + (high - low) / 2

    @cached_property
    def half(self) -> Array:
        """Half of the distance between the bounds, ``[A]`` in float64."""
        low, high = self.bounds
        return (high - low) / 2


_FLATTEN = (
    "flatten it with env.wrappers=[gymnasium.wrappers:FlattenObservation], or wrap it in a class of yours that "
    "makes a vector (env.wrappers=[my_module:MyWrapper]); some environments give one by env.kwargs={...}"
)
_WRAP = "wrap it in a class of yours that has one, with bounds (env.wrappers=[my_module:MyWrapper])"
#: Bounds from here on stand for none.
_FAR = 1e15


def _really_bounded(space: Box) -> bool:
    """Return False for bounds that are infinite, or where their type ends."""
    far, dtype = _FAR, np.dtype(space.dtype)
    if np.issubdtype(dtype, np.integer) and dtype.itemsize >= 4:
        far = min(far, float(np.iinfo(dtype.name).max))
    bounds = np.array([space.low, space.high], np.float64)
    return bool((np.abs(bounds) < far).all())


def _shown(space: Any) -> str:
    text = " ".join(str(space).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def to_policy_observation(obs: Any, spaces: TaskSpaces, out: Array | None = None) -> Array:
    """Pad native observations with zeros: ``[..., obs_size]`` to float32 ``[..., policy_obs_size]``.

    ``out`` (one row, its padding zero already) is written and returned if given: engines step with it.
    Raises UserError for another size.
    """
    try:
        obs = np.asarray(obs)
        if out is None:
            if obs.shape[-1:] != (spaces.obs_size,):
                raise UserError(_misshapen(obs, spaces))
            out = np.zeros((*obs.shape[:-1], spaces.policy_obs_size), np.float32)
        elif obs.shape != (spaces.obs_size,):
            if obs.size != spaces.obs_size or max(obs.shape, default=1) != obs.size:
                raise UserError(_misshapen(obs, spaces))
            obs = obs.reshape(-1)  # (3, 1) and (1, 3) are (3,)
        out[..., : spaces.obs_size] = obs
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"an observation is not {spaces.obs_size} numbers: {error}") from error
    return out


def _misshapen(obs: Array, spaces: TaskSpaces) -> str:
    return f"an observation has shape {obs.shape}; this task observes {spaces.obs_size} numbers"


def to_number(reward: Any) -> float:
    """Return a reward as a float; ``[1.0]`` is one number, too. Raises UserError for what is not."""
    try:
        return (
            float(reward) if not isinstance(reward, np.ndarray | list | tuple) else float(np.asarray(reward).item())
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"a reward is {_shown(reward)}; it must be one number") from error


def to_native_action(action: Any, spaces: TaskSpaces) -> Any:
    """Turn a policy's actions into the task's own.

    A Box takes the first dimensions of ``[..., A]``, clipped to [-1, 1] and scaled to its bounds, and rounded where
    it has whole numbers. A Discrete takes one choice (and gives an int) or an array of choices. Raises UserError
    for a choice that does not exist.
    """
    if not spaces.choices:
        own = np.clip(action[..., : len(spaces.low)], -1.0, 1.0)
        native = spaces.centre + spaces.half * own
        if spaces.action_dtype.kind in "iu":
            native = np.rint(native)
        low, high = spaces.bounds
        return np.minimum(np.maximum(native, low), high).astype(spaces.action_dtype)
    if isinstance(action, np.ndarray) and action.ndim:
        return np.array([to_native_action(choice, spaces) for choice in action])
    if not 0 <= action < spaces.choices:
        raise UserError(f"action {action} does not exist here: this task has actions 0 to {spaces.choices - 1}")
    return spaces.start + int(action)
