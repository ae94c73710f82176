"""Any registered gymnasium environments as the tasks of one suite.

Observations are padded with zeros to the longest, actions to the most dimensions or choices; ``action_mask``
says which actions a task really has. Box actions are rescaled from [-1, 1] to the environment's own bounds.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from varshare_rl.envs.engine import SlotEngine
from varshare_rl.envs.slots import Array, Episode
from varshare_rl.envs.suite import BoolArray
from varshare_rl.envs.workers import Workers
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.registry import register

#: One step of one environment, roughly.
_STEP_SECONDS = 5e-5


@register("env", "gymnasium")
@dataclass
class GymnasiumConfig:
    """``env=gymnasium``: any registered Gymnasium environments; unequal spaces are padded and masked."""

    name: str = "gymnasium"
    ids: list[str] = field(default_factory=list)
    "Registered ids such as `Hopper-v5`, or `module:Id-v0` to import a module first."
    envs_per_task: int = bounded(1, least=1)
    "Environments of every task."
    workers: int = bounded(0, least=0)
    "Processes that step the environments; 0: as many as pay, 1: this one."
    horizon: int | None = bounded(None, least=1)
    "Steps until an episode is truncated; null: each environment's registered limit."

    def build(self) -> GymnasiumSuite:
        """The suite. Raises UserError for impossible options."""
        return GymnasiumSuite(self)


@dataclass(frozen=True)
class GymnasiumFactory:
    """Makes the environment of a task; sent to the workers."""

    ids: tuple[str, ...]
    kwargs: tuple[Mapping[str, Any], ...]  # arguments of each environment's constructor
    horizons: tuple[int, ...]
    observation_size: int

    def __call__(self, task: int) -> GymnasiumEnv:
        env = make_env(self.ids[task], self.horizons[task], self.kwargs[task])
        return GymnasiumEnv(env, self.observation_size)


class GymnasiumEnv:
    """One gymnasium environment (``varshare_rl.envs.slots.TaskEnv``), reset with the episode's own seed."""

    def __init__(self, env: gymnasium.Env[Any, Any], observation_size: int) -> None:
        self._env = env
        self._padded = np.zeros(observation_size, dtype=np.float32)
        self._space = env.action_space
        if isinstance(self._space, Box):
            self._centre = (self._space.high + self._space.low) / 2
            self._half = (self._space.high - self._space.low) / 2

    def reset(self, episode: Episode) -> Array:
        return self._pad(self._env.reset(seed=episode.integer_seed())[0])

    def step(self, action: Array) -> tuple[Array, float, bool, bool, bool]:
        obs, reward, terminated, truncated, _ = self._env.step(self._native(action))
        return self._pad(obs), float(reward), bool(terminated), bool(truncated), False

    def close(self) -> None:
        self._env.close()

    def _pad(self, obs: Array) -> Array:
        self._padded[: obs.size] = obs
        return self._padded

    def _native(self, action: Array) -> Any:
        space = self._space
        if isinstance(space, Discrete):
            if not 0 <= action < space.n:
                raise ValueError(f"action {action} does not exist here: this task has actions 0 to {space.n - 1}")
            return space.start + int(action)
        own = np.clip(action[: self._half.size], -1.0, 1.0)
        return (self._centre + self._half * own).astype(space.dtype)


def make_env(env_id: str, horizon: int | None, kwargs: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    """``gymnasium.make`` without the checking wrapper. Raises SuiteError, one line, if it fails."""
    try:
        with warnings.catch_warnings():
            # Box2D's import warns so; with warnings as errors it ends the process instead of raising.
            warnings.filterwarnings("ignore", r"builtin type \w+ has no __module__ attribute")
            return gymnasium.make(env_id, max_episode_steps=horizon, disable_env_checker=True, **kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot make the gymnasium environment {env_id!r}: {reason}") from error


@dataclass(frozen=True)
class _Sizes:
    """What one environment looks like."""

    observation: int
    actions: int  # dimensions of a Box, choices of a Discrete
    discrete: bool
    horizon: int


def _inspect(env_id: str, horizon: int | None, kwargs: Mapping[str, Any]) -> _Sizes:
    if horizon is not None and horizon < 1:
        raise UserError(f"horizon={horizon} is not possible: it must be at least 1")
    env = make_env(env_id, horizon, kwargs)
    try:
        observed, acted = env.observation_space, env.action_space
        if not isinstance(observed, Box) or len(observed.shape) != 1:
            raise UserError(f"{env_id} observes {observed}: only Box vectors of one dimension are supported")
        limit = env.spec.max_episode_steps if env.spec is not None else None
        if limit is None:
            raise UserError(f"{env_id} has no time limit of its own: set horizon, for example horizon=1000")
        if isinstance(acted, Discrete):
            return _Sizes(observed.shape[0], int(acted.n), True, limit)
        if isinstance(acted, Box) and len(acted.shape) == 1 and acted.is_bounded():
            return _Sizes(observed.shape[0], acted.shape[0], False, limit)
        raise UserError(f"{env_id} acts in {acted}: only Discrete and bounded Box vectors are supported")
    finally:
        env.close()


class GymnasiumSuite:
    """The suite (``varshare_rl.envs.suite.Suite``). Raises SuiteError for impossible options.

    ``names`` and ``kwargs`` are for suites of variants of one environment: task names and constructor
    arguments, one per id.
    """

    has_success = False

    def __init__(
        self,
        config: GymnasiumConfig,
        names: tuple[str, ...] | None = None,
        kwargs: tuple[Mapping[str, Any], ...] | None = None,
    ) -> None:
        ids = tuple(config.ids)
        if not ids:
            raise UserError("no gymnasium environments given: set ids=[Hopper-v5,...]")
        kwargs = kwargs or tuple({} for _ in ids)
        sizes = [_inspect(i, config.horizon, k) for i, k in zip(ids, kwargs, strict=True)]
        if len({size.discrete for size in sizes}) > 1:
            kinds = ", ".join(
                f"{i} ({'Discrete' if s.discrete else 'Box'})" for i, s in zip(ids, sizes, strict=True)
            )
            raise UserError(f"Discrete and Box actions cannot be mixed in one suite: {kinds}; run them apart")
        self.name = config.name
        self.config = config
        self.task_names = names or _distinct(ids)
        self.horizon = max(size.horizon for size in sizes)
        most = max(size.actions for size in sizes)
        self.action_mask: BoolArray = np.arange(most) < np.array([[size.actions] for size in sizes])
        self.action_space: Box | Discrete = (
            Discrete(most) if sizes[0].discrete else Box(-1.0, 1.0, (most,), np.float32)
        )
        longest = max(size.observation for size in sizes)
        self.observation_space: Box = Box(-np.inf, np.inf, (longest,), np.float32)
        self.factory = GymnasiumFactory(ids, kwargs, tuple(size.horizon for size in sizes), longest)
        self._workers = Workers()

    @property
    def provenance(self) -> Mapping[str, str | int | float | bool | None]:
        """Versions, ids and horizon."""
        return {
            "suite": self.name,
            "gymnasium": gymnasium.__version__,
            "mujoco": importlib.metadata.version("mujoco"),
            "tasks": ",".join(self.task_names),
            "ids": ",".join(self.factory.ids),
            "horizon": self.horizon,
        }

    def make_engine(self, envs_per_task: int, seed: int, evaluation: bool = False) -> SlotEngine:
        """See ``Suite.make_engine``."""
        return SlotEngine(
            self.factory,
            step_seconds=[_STEP_SECONDS] * len(self.task_names),
            envs_per_task=envs_per_task,
            observation_size=self.observation_space.shape[0],
            action_space=self.action_space,
            seed=seed,
            evaluation=evaluation,
            workers=self.config.workers,
            processes=self._workers,
        )


def _distinct(ids: tuple[str, ...]) -> tuple[str, ...]:
    """Names without repeats: the second ``A-v0`` is called ``A-v0#2``."""
    seen: Counter[str] = Counter()
    names = []
    for name in ids:
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return tuple(names)
