"""One gymnasium environment as a slot's environment, and what has to be done so that its episodes can be repeated.

A slot is restored by replaying its episode, so seed and actions alone must decide it. Environments that draw from
the global generators get these for themselves; those that keep something through a reset are made anew for every
episode. :func:`find_habits` tries out which ones do.
"""

from __future__ import annotations

import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from varshare_rl.envs.pictures import render
from varshare_rl.envs.slots import Array, Episode
from varshare_rl.envs.spaces import TaskSpaces, to_native_action, to_number, to_policy_observation
from varshare_rl.errors import UserError

#: A function without arguments that makes a new environment each time.
Maker = Callable[[], gymnasium.Env[Any, Any]]

#: Steps of the episode that wears an environment in, and of the one that is then played in it and in a new one.
WEAR_STEPS, REPLAY_STEPS = 200, 50
#: Observation, reward, terminated, truncated.
_Seen = tuple[bytes, bytes, bool, bool]


@dataclass(frozen=True)
class Habits:
    """How an environment's episodes depend on more than its seed and actions."""

    remembers: bool = False  # the episodes before, through a reset
    global_random: bool = False  # the global generators of numpy and Python
    repeats: bool = True  # False: also a new environment plays the same episode in another way


class GlobalRandom:
    """The global generators of numpy and Python, as one environment has them for itself."""

    def __init__(self) -> None:
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Begin anew."""
        self._seeded = self._state = (np.random.RandomState(seed).get_state(), random.Random(seed).getstate())

    @property
    def drawn(self) -> bool:
        """Return True if something was drawn since :meth:`seed`."""
        (_, keys, position, *_), python = self._state
        (_, first_keys, first_position, *_), first_python = self._seeded
        return position != first_position or python != first_python or not np.array_equal(keys, first_keys)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, the global generators are these; outside they are untouched."""
        outside = _global_state()
        _set_global_state(self._state)
        try:
            yield
        finally:
            self._state = _global_state()
            _set_global_state(outside)


def _global_state() -> tuple[Any, Any]:
    return np.random.get_state(), random.getstate()  # noqa: NPY002


def _set_global_state(state: tuple[Any, Any]) -> None:
    np.random.set_state(state[0])  # noqa: NPY002
    random.setstate(state[1])


class ObjectEnv:
    """One gymnasium environment (``varshare_rl.envs.slots.TaskEnv``), reset with the episode's own seed."""

    def __init__(self, name: str, make: Maker, spaces: TaskSpaces, habits: Habits) -> None:
        self.repeats = habits.repeats
        self.random = GlobalRandom() if habits.global_random else None
        self.env = make_env(name, make)
        self._name, self._make, self._spaces, self._habits = name, make, spaces, habits
        self._used = False
        self._padded = np.zeros(spaces.policy_obs_size, dtype=np.float32)

    def reset(self, episode: Episode) -> Array:
        seed = episode.integer_seed()
        if self._used and self._habits.remembers:
            self.env.close()
            self.env = make_env(self._name, self._make)
        self._used = True
        if self.random is None:
            obs = self.env.reset(seed=seed)[0]
        else:
            self.random.seed(seed)
            with self.random.open():
                obs = self.env.reset(seed=seed)[0]
        try:
            return to_policy_observation(obs, self._spaces, self._padded)
        except UserError as error:
            raise self._named(error) from error

    def step(self, action: Array) -> tuple[Array, float, bool, bool, bool]:
        native = to_native_action(action, self._spaces)
        if self.random is None:
            obs, reward, terminated, truncated, info = self.env.step(native)
        else:
            with self.random.open():
                obs, reward, terminated, truncated, info = self.env.step(native)
        success = info.get("success", False) or info.get("is_success", False)
        try:
            padded = to_policy_observation(obs, self._spaces, self._padded)
            return padded, to_number(reward), bool(terminated), bool(truncated), bool(success)
        except UserError as error:
            raise self._named(error) from error

    def render(self) -> Array:
        frame = render(self.env)
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            raise UserError(
                f"the environment of task {self._name} gives no pictures, its render_mode is "
                f"{self.env.render_mode!r}; make it with render_mode='rgb_array', or leave video=true out"
            )
        return frame.astype(np.uint8, copy=False)

    def close(self) -> None:
        self.env.close()

    def _named(self, error: UserError) -> UserError:
        return UserError(f"task {self._name}: {error}")


@dataclass(frozen=True)
class EnvFactory:
    """Makes the environment of a task; sent to the workers."""

    names: tuple[str, ...]
    makers: tuple[Maker, ...]
    spaces: tuple[TaskSpaces, ...]
    habits: tuple[Habits, ...]

    def __call__(self, task: int) -> ObjectEnv:
        return ObjectEnv(self.names[task], self.makers[task], self.spaces[task], self.habits[task])


#: Environments that are in use, by id: a second slot must not step the same object.
_in_use: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def make_env(name: str, make: Maker) -> gymnasium.Env[Any, Any]:
    """Make a new environment, whatever it draws from the global generators being the same each time.

    Raises:
        UserError: one line naming the task, for whatever goes wrong.
    """
    try:
        with GlobalRandom().open():
            env = make()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"cannot make the environment {name!r}: {one_line(error)}") from error
    if not isinstance(env, gymnasium.Env):
        raise UserError(f"the environment {name!r} is of type {type(env).__name__}: it must be a gymnasium.Env")
    if _in_use.get(id(env.unwrapped)) is env.unwrapped:
        raise UserError(f"the environment {name!r} was made twice as the same object: make a new one in every call")
    _in_use[id(env.unwrapped)] = env.unwrapped
    return env


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, gymnasium.error.Error) else f"{type(error).__name__}: {text}"


def find_habits(name: str, make: Maker, spaces: TaskSpaces) -> Habits:
    """Play one short episode in a used and in a new environment, and look where they differ.

    Raises:
        UserError: the environment fails.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again when the environments are made to be used
        return _find_habits(name, make, spaces)


def _find_habits(name: str, make: Maker, spaces: TaskSpaces) -> Habits:
    wearing, played = (Episode(np.random.SeedSequence(0, spawn_key=(number,)), None) for number in (0, 1))
    used = _probe(name, make, spaces)
    try:
        _play(used, spaces, wearing, WEAR_STEPS)
        world = getattr(used.env.unwrapped, "world", None)
        found = _play(used, spaces, played, REPLAY_STEPS)
        # A Box2D world keeps the order of its contacts, which shows in few episodes only.
        keeps_world = type(world).__name__ == "b2World" and getattr(used.env.unwrapped, "world", None) is world
        assert used.random is not None
        global_random = used.random.drawn
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the environment {name!r} fails when it is tried out: {one_line(error)}") from error
    finally:
        used.close()
    new = _play_new(name, make, spaces, played)
    if found == new:
        return Habits(remembers=keeps_world, global_random=global_random)
    return Habits(True, global_random, repeats=_play_new(name, make, spaces, played) == new)


def _probe(name: str, make: Maker, spaces: TaskSpaces) -> ObjectEnv:
    return ObjectEnv(name, make, spaces, Habits(global_random=True))


def _play_new(name: str, make: Maker, spaces: TaskSpaces, episode: Episode) -> list[_Seen]:
    env = _probe(name, make, spaces)
    try:
        return _play(env, spaces, episode, REPLAY_STEPS)
    finally:
        env.close()


def _play(env: ObjectEnv, spaces: TaskSpaces, episode: Episode, steps: int) -> list[_Seen]:
    """Play random actions, always the same; returns what was seen of each step, to the bit."""
    actions = np.random.default_rng(episode.seed)
    seen = [(env.reset(episode).tobytes(), b"", False, False)]
    while len(seen) <= steps and not any(seen[-1][2:]):
        size = spaces.action_size
        action: Any = actions.integers(size)
        if not spaces.discrete:
            action = actions.uniform(-1.0, 1.0, size).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        seen.append((obs.tobytes(), np.float64(reward).tobytes(), terminated, truncated))
    return seen
