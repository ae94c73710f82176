"""One vector engine for suites whose physics is a few lines of numpy.

All ``T x E`` slots advance in the same array operations; a slot's randomness comes from a counter-based
generator keyed by (seed, stream, slot, episode), so it needs no generator object and no state of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from varshare_rl.envs.division import Part
from varshare_rl.envs.suite import FloatArray, Frame, IntArray, PendingActions, State, Step, check_identity
from varshare_rl.errors import UserError

Float64Array = npt.NDArray[np.float64]
UInt64Array = npt.NDArray[np.uint64]

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counters: UInt64Array, key: tuple[int, int]) -> UInt64Array:
    """Random 32-bit words from counters: Philox4x32-10, the same function for every row.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. ``counters`` is
    ``[N, 4]`` and ``key`` a pair, all of them 32-bit words; returns ``[N, 4]`` 32-bit words, held in uint64.
    """
    c0, c1, c2, c3 = counters.T
    k0, k1 = key
    for _ in range(_ROUNDS):
        low = _MULTIPLIERS[0] * c0
        high = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (high >> _SHIFT) ^ c1 ^ np.uint64(k0),
            high & _MASK,
            (low >> _SHIFT) ^ c3 ^ np.uint64(k1),
            low & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


class Dynamics(Protocol):
    """The physics of a suite, for all slots at once. ``S`` is the size of the physical state."""

    horizon: int
    streams: IntArray  # [T] tasks with equal streams draw the same episodes

    def initial(self, uniforms: Float64Array) -> Float64Array:
        """First states of episodes, ``[N, S]``, from four uniforms in [0, 1) each, ``[N, 4]``."""

    def advance(
        self, states: Float64Array, actions: npt.NDArray[Any]
    ) -> tuple[Float64Array, Float64Array, npt.NDArray[np.bool_]]:
        """Next states ``[T, E, S]``, rewards ``[T, E]`` and terminations ``[T, E]``."""

    def achieved(self, states: Float64Array) -> npt.NDArray[np.bool_]:
        """Return True where ending an episode at the horizon is a success, ``[T, E]``."""

    def draw(self, task: int, state: Float64Array) -> Frame:
        """Picture of one slot's state ``[S]``."""

    def check_actions(self, actions: npt.NDArray[Any], slots: tuple[int, int]) -> npt.NDArray[Any]:
        """The actions as ``advance`` wants them. Raises UserError for a wrong shape or choice."""


class BatchedEngine:
    """A ``VectorEngine`` over any ``Dynamics``; the observation is the physical state in float32.

    Training episode ``j`` of slot ``(t, e)`` starts from the draw (seed, stream of t, e, j). In evaluation it
    starts from the draw of episode ``j * E + e`` of its stream, so the same episodes are seen for any ``E``.
    """

    def __init__(
        self, dynamics: Dynamics, envs_per_task: int, seed: int, evaluation: bool, part: Part | None = None
    ) -> None:
        if envs_per_task < 1:
            raise UserError(f"envs_per_task={envs_per_task}: at least 1 is needed; give a positive number")
        if not 0 <= seed < 2**64:
            raise UserError(f"seed={seed}: seeds are whole numbers from 0 to 2**64 - 1; give one of those")
        self.num_tasks = len(dynamics.streams)
        self._whole, envs = envs_per_task, range(envs_per_task) if part is None else part.envs
        self.envs_per_task = len(envs)
        self._part = {} if part is None else {"tasks": list(part.tasks), "envs": list(envs)}
        self._dynamics = dynamics
        self._evaluation = evaluation
        self._seed = seed
        self._key = (seed & 0xFFFFFFFF, seed >> 32)
        tasks = np.arange(self.num_tasks, dtype=np.int64) if part is None else np.array(part.tasks, np.int64)
        self._task_id = np.repeat(tasks[:, None], len(envs), axis=1)
        self._stream = np.repeat(dynamics.streams[:, None], len(envs), axis=1)
        self._slot = np.repeat(np.array(envs, dtype=np.int64)[None], self.num_tasks, axis=0)
        self._turns = PendingActions(self.num_tasks, len(envs))
        self._actions: npt.NDArray[Any] = np.zeros(0)
        self.reset()

    def reset(self) -> FloatArray:
        """Restart every slot at its episode 0; returns the observations ``[T, E, F]``."""
        shape = (self.num_tasks, self.envs_per_task)
        self._episode = np.zeros(shape, dtype=np.int64)
        self._elapsed = np.zeros(shape, dtype=np.int64)
        everywhere = np.ones(shape, dtype=np.bool_)
        starts = self._starts(everywhere)
        self._states = starts.reshape(*shape, starts.shape[-1])
        self._turns.clear()
        return self._states.astype(np.float32)

    def step(self, actions: npt.NDArray[Any]) -> Step:
        """Advance every slot by one step; a slot whose episode ends is reset within the same call."""
        checked = self._dynamics.check_actions(actions, (self.num_tasks, self.envs_per_task))
        states, reward, terminated = self._dynamics.advance(self._states, checked)
        self._elapsed += 1
        # A task that ended at the horizon ended: there is nothing left to bootstrap from.
        truncated = (self._elapsed >= self._dynamics.horizon) & ~terminated
        success = truncated & self._dynamics.achieved(states)
        next_obs = states.astype(np.float32)
        done = terminated | truncated
        if done.any():
            self._episode[done] += 1
            self._elapsed[done] = 0
            states[done] = self._starts(done)
            obs = states.astype(np.float32)
        else:
            obs = next_obs.copy()
        self._states = states
        return Step(
            obs=obs,
            next_obs=next_obs,
            reward=reward.astype(np.float32),
            terminated=terminated,
            truncated=truncated,
            success=success,
            task_id=self._task_id.copy(),
        )

    def render(self) -> list[Frame]:
        """See ``RenderingEngine.render``."""
        return [self._dynamics.draw(task, self._states[task, 0]) for task in range(self.num_tasks)]

    def begin(self, actions: npt.NDArray[Any], envs: slice) -> None:
        """See ``VectorEngine.begin``; all slots are advanced together, in :meth:`finish`."""
        if not self._turns.begun:
            shape = (self.num_tasks, self.envs_per_task, *actions.shape[2:])
            self._actions = np.zeros(shape, dtype=actions.dtype)
        self._turns.give(actions, envs, self._actions.shape[2:])
        self._actions[:, envs] = actions

    def finish(self) -> Step:
        """See ``VectorEngine.finish``."""
        self._turns.complete()
        return self.step(self._actions)

    def state(self) -> State:
        """Physical states, steps into the episode and episode numbers of every slot."""
        return {
            **self._identity(),
            "states": self._states.copy(),
            "elapsed": self._elapsed.copy(),
            "episode": self._episode.copy(),
        }

    def load_state(self, state: State) -> FloatArray:
        """Put a state of an engine of the same suite, seed and size back; returns ``[T, E, F]``."""
        check_identity(state, self._identity())
        self._states = np.array(state["states"], dtype=np.float64)
        self._elapsed = np.array(state["elapsed"], dtype=np.int64)
        self._episode = np.array(state["episode"], dtype=np.int64)
        self._turns.clear()
        return self._states.astype(np.float32)

    def close(self) -> None:
        """Nothing to free: the engine is a few arrays."""

    def _identity(self) -> State:
        return {
            "num_tasks": self.num_tasks,
            "envs_per_task": self.envs_per_task,
            "seed": self._seed,
            "evaluation": self._evaluation,
            **self._part,
        }

    def _starts(self, where: npt.NDArray[np.bool_]) -> Float64Array:
        """First states of the current episodes of the chosen slots, ``[N, S]``."""
        episode, slot = self._episode[where], self._slot[where]
        if self._evaluation:
            episode, slot = episode * self._whole + slot, np.zeros_like(slot)
        phase = np.full_like(slot, int(self._evaluation))
        counters = np.stack([self._stream[where], slot, episode, phase], axis=-1).astype(np.uint64)
        return self._dynamics.initial(philox(counters, self._key).astype(np.float64) / 2.0**32)


def select(requested: Sequence[str], available: Sequence[str], suite: str) -> tuple[str, ...]:
    """The requested task names in their order, or all of them if none is named.

    Raises UserError for a name that does not exist or is given twice.
    """
    if not requested:
        return tuple(available)
    for position, name in enumerate(requested):
        if name not in available:
            raise UserError(f"unknown {suite} task '{name}': choose from {', '.join(available)}")
        if name in requested[:position]:
            raise UserError(f"{suite} task '{name}' is named twice: name each task once")
    return tuple(requested)


def require_at_least_one(option: str, value: int) -> None:
    """Raise UserError unless a count from the options is positive."""
    if value < 1:
        raise UserError(f"{option}={value}: at least 1 is needed; give a positive number")
