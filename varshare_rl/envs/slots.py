"""One environment per slot: the small interface that single-task environments follow, and autoreset.

A slot is one environment of one task. Its whole history is the number of its episode and the actions since
that episode began: environments are reset from the episode's own seed, so replaying those actions in a
fresh environment restores it exactly, with no knowledge of its inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from varshare_rl.envs.division import Part
from varshare_rl.envs.suite import State
from varshare_rl.errors import EpisodePlace, RunFailure, UserError, one_line

Array = npt.NDArray[Any]


class EnvironmentFailure(RunFailure):
    """An environment raised an error. The message names task, environment, episode and step."""


@dataclass(frozen=True)
class Episode:
    """Seed and number: they decide an episode before its first action."""

    seed: np.random.SeedSequence
    #: Position in the evaluation sweep of the task (0, 1, ...); None in training.
    sweep: int | None

    def choose(self, count: int) -> int:
        """One of ``count`` fixed choices (goals): in turn in the evaluation sweep, at random in training."""
        if self.sweep is not None:
            return self.sweep % count
        return int(np.random.default_rng(self.seed).integers(count))

    def integer_seed(self) -> int:
        """A 32-bit seed, for interfaces that take an integer."""
        return int(self.seed.generate_state(1)[0])


class TaskEnv(Protocol):
    """One environment of one task.

    A reset must forget everything before it: the episode and the actions alone decide what follows. One that cannot
    promise that has an attribute ``repeats`` that is False, and is not restored in the middle of an episode.
    """

    def reset(self, episode: Episode) -> Array:
        """Begin an episode; returns the first observation, ``[F]``."""

    def step(self, action: Array) -> tuple[Array, float, bool, bool, bool]:
        """Returns (observation ``[F]``, reward, terminated, truncated, success flag of this step).

        A step that is both terminated and truncated counts as terminated.
        """

    def render(self) -> npt.NDArray[np.uint8]:
        """Picture ``[height, width, 3]`` of what is now; asked of environments that were made for it alone."""

    def close(self) -> None:
        """Free what the environment holds."""


class TimedEnv:
    """A ``TaskEnv`` around another: observations end with the share of the horizon that has passed, -1 to 1."""

    def __init__(self, env: TaskEnv, horizon: int) -> None:
        self.env, self.horizon, self.steps = env, horizon, 0

    def reset(self, episode: Episode) -> Array:
        self.steps = 0
        return with_time(self.env.reset(episode), 0, self.horizon)

    def step(self, action: Array) -> tuple[Array, float, bool, bool, bool]:
        self.steps += 1
        obs, reward, terminated, truncated, success = self.env.step(action)
        return with_time(obs, self.steps, self.horizon), reward, terminated, truncated, success

    def render(self) -> npt.NDArray[np.uint8]:
        return self.env.render()

    def close(self) -> None:
        self.env.close()


def with_time(obs: Array, steps: Array | int, horizon: int) -> Array:
    """Return observations ``[..., F]`` with ``2 steps / horizon - 1`` as another entry."""
    time = np.asarray(2.0 * np.asarray(steps) / horizon - 1.0, obs.dtype)
    return np.concatenate([obs, time[..., None]], axis=-1)


class TaskEnvFactory(Protocol):
    """Makes the environment of a task. Must be picklable: workers receive it when they start."""

    def __call__(self, task: int) -> TaskEnv:
        """A fresh environment of task number ``task``."""


@dataclass(frozen=True)
class EngineSpec:
    """Sizes and seeds that the engine and its workers share."""

    num_tasks: int
    envs_per_task: int
    observation_size: int
    action_shape: tuple[int, ...]  # of one slot: (A,) for Box, () for Discrete
    action_dtype: str  # "float32" for Box, "int64" for Discrete
    seed: int
    evaluation: bool
    task_names: tuple[str, ...] = ()
    part: Part | None = None  # of a larger engine, whose numbers tasks and environments then have
    stagger: int = 0  # steps in which a task's environments end their first training episodes; 0: as all others
    most_steps: int | None = None  # after which a training episode is truncated; None: when its environment says so

    def place(self, slot: int) -> tuple[int, int]:
        """Return the numbers of a slot's task, and of the environment among those of its task."""
        task, e = divmod(slot, self.envs_per_task)
        return (task, e) if self.part is None else (self.part.tasks[task], self.part.envs[e])

    def task_name(self, slot: int) -> str:
        """Return the name of a slot's task, or its number where tasks have no names."""
        task, _ = self.place(slot)
        return self.task_names[task] if self.task_names else str(task)

    @property
    def num_slots(self) -> int:
        return self.num_tasks * self.envs_per_task

    @property
    def envs_everywhere(self) -> int:
        """Environments of every task, those of other parts too."""
        return self.envs_per_task if self.part is None else self.part.envs_per_task

    def limit(self, slot: int, episode: int) -> int | None:
        """Return after how many steps a slot's episode is truncated; None: when its environment says so."""
        if self.evaluation:
            return None
        if episode or self.stagger == 0:
            return self.most_steps
        return max(self.stagger * (self.place(slot)[1] + 1) // self.envs_everywhere, 1)

    def training_episode(self, slot: int, index: int) -> EpisodePlace | None:
        """Return task, environment and number of an episode, for failures to name; None in evaluation."""
        return None if self.evaluation else (*self.place(slot), index)

    def episode(self, slot: int, index: int) -> Episode:
        """Episode number ``index`` of ``slot`` (= task * envs_per_task + e).

        Training episodes are seeded by (seed, 0) with spawn key (task, e, index). Evaluation episodes are
        seeded by (seed, 1) with spawn key (task, sweep position), so that they do not depend on
        ``envs_per_task``.
        """
        task, e = self.place(slot)
        if self.evaluation:
            sweep = index * self.envs_everywhere + e
            return Episode(np.random.SeedSequence((self.seed, 1), spawn_key=(task, sweep)), sweep)
        return Episode(np.random.SeedSequence((self.seed, 0), spawn_key=(task, e, index)), None)


@dataclass(frozen=True)
class Buffers:
    """The arrays that engine and workers share; first axis = slot."""

    actions: Array
    obs: npt.NDArray[np.float32]
    next_obs: npt.NDArray[np.float32]
    reward: npt.NDArray[np.float32]
    flags: npt.NDArray[np.bool_]  # [slots, 3]: terminated, truncated, success
    busy: npt.NDArray[np.int64]  # 1 + the number of its episode while a slot's environment works, else 0

    @staticmethod
    def _layout(spec: EngineSpec) -> list[tuple[tuple[int, ...], str]]:
        n, f = spec.num_slots, spec.observation_size
        return [
            ((n, *spec.action_shape), spec.action_dtype),
            ((n, f), "float32"),
            ((n, f), "float32"),
            ((n,), "float32"),
            ((n, 3), "bool"),
            ((n,), "int64"),
        ]

    @staticmethod
    def size(spec: EngineSpec) -> int:
        """Bytes that all arrays need; each starts on its own 64-byte line."""
        return sum(_aligned(_bytes(shape, dtype)) for shape, dtype in Buffers._layout(spec))

    @staticmethod
    def over(spec: EngineSpec, memory: Any) -> Buffers:
        """Lay the arrays over ``memory``, any writable buffer of at least ``size(spec)`` bytes."""
        arrays, offset = [], 0
        for shape, dtype in Buffers._layout(spec):
            arrays.append(np.ndarray(shape, dtype, buffer=memory, offset=offset))
            offset += _aligned(_bytes(shape, dtype))
        return Buffers(*arrays)


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


class Slot:
    """One environment with autoreset and a record of the actions since its last reset.

    Its rows of the buffers are looked up once: what is written to them is there for everyone.

    Attributes:
        left_out: numbers of episodes that are passed over, because they fail.
    """

    def __init__(self, env: TaskEnv, spec: EngineSpec, index: int, buffers: Buffers) -> None:
        self.env = env
        self.spec = spec
        self.index = index
        self.env_index = index % spec.envs_per_task  # among the environments of its task
        self.episode = 0
        self.left_out: set[int] = set()
        self.actions: list[Array] = []
        self._limit = math.inf
        self._action = buffers.actions[index : index + 1]  # a row stays a view, also where it is one number
        self._obs, self._next_obs, self._flags = (
            part[index] for part in (buffers.obs, buffers.next_obs, buffers.flags)
        )
        self._reward, self._busy = (part[index : index + 1] for part in (buffers.reward, buffers.busy))

    def begin(self, episode: int) -> None:
        """Start episode number ``episode``, or the next that is not left out, and write its first observation."""
        while episode in self.left_out:
            episode += 1
        self.episode, self.actions = episode, []
        limit = self.spec.limit(self.index, episode)
        self._limit = math.inf if limit is None else limit
        self._busy[0] = episode + 1
        self._obs[:] = self.env.reset(self.spec.episode(self.index, episode))
        self._busy[0] = 0

    def step(self) -> None:
        """Do the action in the buffers; at an episode's end begin the next one at once."""
        self._busy[0] = self.episode + 1
        action = self._action[0].copy()
        self._next_obs[:], self._reward[0], terminated, truncated, success = self.env.step(action)
        truncated = truncated or len(self.actions) + 1 >= self._limit
        flags = self._flags
        flags[0], flags[1], flags[2] = terminated, truncated and not terminated, success
        if terminated or truncated:
            self.begin(self.episode + 1)
        else:
            self.actions.append(action)
            self._obs[:] = self._next_obs
            self._busy[0] = 0

    def state(self) -> State:
        shape = (len(self.actions), *self.spec.action_shape)
        actions = np.array(self.actions, dtype=self.spec.action_dtype).reshape(shape)
        left_out = sorted(self.left_out)
        return {"episode": self.episode, "actions": actions, "obs": self._obs.copy(), "left_out": left_out}

    def load_state(self, state: State) -> None:
        self.left_out = set(state.get("left_out", ()))  # checkpoints of earlier versions have none
        episode = int(state["episode"])
        if not getattr(self.env, "repeats", True):
            self.begin(episode + 1)
            return
        self.begin(episode)
        if self.episode != episode:  # which is left out
            return
        for action in np.asarray(state["actions"], dtype=self.spec.action_dtype):
            self.actions.append(action.copy())
            self._obs[:] = self.env.step(self.actions[-1])[0]
        if not np.array_equal(self._obs, state["obs"], equal_nan=True):
            raise UserError(
                f"replaying task {self.spec.task_name(self.index)} does not lead back to its saved "
                "observation: it is not deterministic, or its package or machine changed; resume with the "
                "versions that the run recorded"
            )


class Chunk:
    """Some slots, stepped one after the other in one process."""

    def __init__(self, factory: TaskEnvFactory, spec: EngineSpec, slots: Sequence[int], buffers: Buffers) -> None:
        self.slots = [Slot(factory(spec.place(i)[0]), spec, i, buffers) for i in slots]

    def reset(self) -> None:
        self._each(self.slots, lambda slot: slot.begin(0))

    def step(self, first: int, last: int) -> None:
        """Step the environments ``first <= e < last`` of every task in the chunk."""
        self._each([slot for slot in self.slots if first <= slot.env_index < last], Slot.step)

    def state(self) -> list[State]:
        return [slot.state() for slot in self.slots]

    def load_state(self, states: list[State]) -> None:
        by_index = {slot.index: state for slot, state in zip(self.slots, states, strict=True)}
        self._each(self.slots, lambda slot: slot.load_state(by_index[slot.index]))

    def close(self) -> None:
        for slot in self.slots:
            slot.env.close()
        self.slots = []

    @staticmethod
    def _each(slots: Sequence[Slot], do: Callable[[Slot], None]) -> None:
        done = 0
        try:
            for slot in slots:
                do(slot)
                done += 1
        except UserError:
            raise
        except Exception as error:
            slot, spec = slots[done], slots[done].spec
            what, number = one_line(error, most=None), spec.place(slot.index)[1]
            raise EnvironmentFailure(
                f"task {spec.task_name(slot.index)} fails with {what} (environment {number}, "
                f"episode {slot.episode}, step {len(slot.actions)})",
                episode=spec.training_episode(slot.index, slot.episode),
            ) from error
