"""Meta-World v3 (Yu et al., 2019; the package ``metaworld``): MT1, MT10, MT25, MT50 and any list of tasks.

The environments are the package's own, without its wrappers: 39 observations with the goal visible, cast to
float32; 4 actions; no termination; episodes are cut at the horizon. MT3 is not an official benchmark: it is
reach, push and pick-place, the first three of MT10.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Discrete
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3, MT25_V3, MT50_V3
from metaworld.types import Task

from varshare_rl.envs.engine import SlotEngine
from varshare_rl.envs.metaworld_costs import STEP_MICROSECONDS
from varshare_rl.envs.metaworld_fast import FastMetaWorldEnv, environment_classes, is_supported
from varshare_rl.envs.metaworld_methods import forget_models
from varshare_rl.envs.slots import Array, Episode, TaskEnv
from varshare_rl.envs.suite import BoolArray
from varshare_rl.envs.workers import Workers
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.registry import register

_OBSERVATION_SIZE = 39
_ACTION_SIZE = 4

BENCHMARKS: dict[str, tuple[str, ...]] = {
    "mt3": ("reach-v3", "push-v3", "pick-place-v3"),
    "mt10": tuple(MT10_V3),
    "mt25": tuple(MT25_V3),
    "mt50": tuple(MT50_V3),
}
#: Benchmarks whose goals the package draws from one random stream over all tasks.
_ONE_STREAM = ("mt10", "mt25", "mt50")


@register("env", "metaworld")
@dataclass
class MetaWorldConfig:
    """``env=metaworld``: Meta-World v3, its benchmarks or any list of its tasks."""

    name: str = "metaworld"
    benchmark: str | None = None
    "`mt1` (with one of `env.tasks`), `mt3`, `mt10`, `mt25` or `mt50`; null: the list in `env.tasks`."
    tasks: list[str] = field(default_factory=list)
    "Names of tasks such as `reach-v3`."
    envs_per_task: int = bounded(4, least=1)
    "Environments of every task."
    workers: int = bounded(0, least=0)
    "Processes that step the environments; 0: as many as pay, 1: this one."
    reward_function_version: str = "v2"
    "Rewards: `v2`, the usual ones, or the older `v1`."
    horizon: int = bounded(500, least=1)
    "Steps until an episode is truncated."
    goals_per_task: int = bounded(50, least=1)
    "Fixed goals of every task."
    goal_seed: int = 0
    "Seed of the fixed goals; the same as `seed` of Meta-World's own benchmarks."
    fast: bool = True
    "The quicker environments with the same results to the bit (v2 rewards only)."

    def build(self) -> MetaWorldSuite:
        """The suite. Raises UserError for impossible options."""
        return MetaWorldSuite(self)


def task_list(config: MetaWorldConfig) -> tuple[str, ...]:
    """The tasks that the options ask for. Raises SuiteError for an impossible choice."""
    names, benchmark = tuple(config.tasks), config.benchmark
    if benchmark is not None and benchmark != "mt1":
        if benchmark not in BENCHMARKS:
            raise UserError(f"unknown Meta-World benchmark {benchmark!r}: choose mt1, {', '.join(BENCHMARKS)}")
        if names:
            raise UserError(f"benchmark {benchmark} has its own tasks: leave tasks empty or benchmark null")
        return BENCHMARKS[benchmark]
    if benchmark == "mt1" and len(names) != 1:
        raise UserError(f"benchmark mt1 needs exactly one task, {len(names)} given: set tasks=[reach-v3]")
    if not names:
        raise UserError("no Meta-World tasks given: set tasks=[reach-v3,...] or benchmark=mt10")
    for name in names:
        if name not in ALL_V3_ENVIRONMENTS:
            close = difflib.get_close_matches(name, ALL_V3_ENVIRONMENTS, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else "names look like reach-v3"
            raise UserError(f"unknown Meta-World task {name!r}: {hint}")
    if len(set(names)) != len(names):
        raise UserError(f"a Meta-World task is listed twice in {', '.join(names)}: list each once")
    return names


@lru_cache(maxsize=8)
def make_goals(
    names: tuple[str, ...], seed: int, goals_per_task: int, one_stream: bool, fast: bool = False
) -> tuple[npt.NDArray[np.float64], ...]:
    """The fixed goals of each task, ``[goals, size]``, the same that the package draws with this seed.

    ``one_stream`` draws all tasks one after the other from one seeded stream, as ``metaworld.MT10(seed)``
    does; otherwise task ``k`` starts its own stream from ``seed + k``, as the package's custom list of tasks
    does. The package simulates the arm at every draw, which the goals do not depend on; here it is left out.
    ``fast`` compiles models where ``varshare_rl.envs.metaworld_fast`` finds them again.
    """
    classes = environment_classes() if fast else ALL_V3_ENVIRONMENTS
    saved = np.random.get_state()  # noqa: NPY002 (the package draws from the global stream)
    try:
        goals = []
        for k, name in enumerate(names):
            if k == 0 or not one_stream:
                np.random.seed(seed if one_stream else seed + k)  # noqa: NPY002
            goals.append(_draw_goals(classes[name], goals_per_task))
    finally:
        np.random.set_state(saved)  # noqa: NPY002
    return tuple(goals)


def _draw_goals(cls: Any, count: int) -> npt.NDArray[np.float64]:
    env = cls()
    env._freeze_rand_vec = False
    env._set_task_called = True
    env.do_simulation = lambda *_: None
    env._get_obs = lambda: np.zeros(_OBSERVATION_SIZE)
    goals = []
    for _ in range(count):
        env.reset()
        goals.append(env._last_rand_vec)
    env.close()
    return np.array(goals)


def as_tasks(name: str, goals: npt.NDArray[np.float64]) -> list[Task]:
    """The goals of one task (``[goals, size]``) in the form that the package's ``set_task`` takes."""
    cls = ALL_V3_ENVIRONMENTS[name]
    return [
        Task(name, pickle.dumps({"rand_vec": goal, "env_cls": cls, "partially_observable": False}))
        for goal in goals
    ]


class MetaWorldEnv:
    """One Meta-World task (``varshare_rl.envs.slots.TaskEnv``). Training draws a goal per episode, evaluation sweeps."""

    def __init__(self, name: str, goals: npt.NDArray[np.float64], reward_version: str, horizon: int) -> None:
        self._env: Any = ALL_V3_ENVIRONMENTS[name](reward_function_version=reward_version)
        self._env.max_path_length = horizon
        self._tasks = as_tasks(name, goals)

    def reset(self, episode: Episode) -> Array:
        self._env.set_task(self._tasks[episode.choose(len(self._tasks))])
        observation: Array = self._env.reset()[0]
        return observation

    def step(self, action: Array) -> tuple[Array, float, bool, bool, bool]:
        obs, reward, terminated, truncated, info = self._env.step(action)
        return obs, float(reward), terminated, truncated, info["success"] == 1.0

    def close(self) -> None:
        self._env.close()


@dataclass(frozen=True)
class MetaWorldFactory:
    """Makes the environment of a task; sent to the workers."""

    names: tuple[str, ...]
    goals: tuple[npt.NDArray[np.float64], ...]
    reward_version: str
    horizon: int
    fast: bool

    def __call__(self, task: int) -> TaskEnv:
        if self.fast:
            return FastMetaWorldEnv(self.names[task], self.goals[task], self.horizon)
        return MetaWorldEnv(self.names[task], self.goals[task], self.reward_version, self.horizon)


class MetaWorldSuite:
    """The suite (``varshare_rl.envs.suite.Suite``). Raises SuiteError for impossible options."""

    has_success = True

    def __init__(self, config: MetaWorldConfig) -> None:
        self.task_names = task_list(config)
        version = config.reward_function_version
        if version not in ("v1", "v2"):
            raise UserError(f"unknown Meta-World reward_function_version {version!r}: choose v1 or v2")
        for key in ("horizon", "goals_per_task"):
            if getattr(config, key) < 1:
                raise UserError(f"{key}={getattr(config, key)} is not possible: it must be at least 1")
        self.name = config.benchmark or config.name
        self.config = config
        self.horizon = config.horizon
        self._workers = Workers()
        self.fast = config.fast and version == "v2" and is_supported()
        self.observation_space: Box = Box(-np.inf, np.inf, (_OBSERVATION_SIZE,), np.float32)
        self.action_space: Box | Discrete = Box(-1.0, 1.0, (_ACTION_SIZE,), np.float32)
        self.action_mask: BoolArray = np.ones((len(self.task_names), _ACTION_SIZE), dtype=np.bool_)

    @property
    def provenance(self) -> Mapping[str, str | int | float | bool | None]:
        """Versions, reward version, horizon, goals and tasks."""
        return {
            "suite": self.name,
            "metaworld": importlib.metadata.version("metaworld"),
            "mujoco": importlib.metadata.version("mujoco"),
            "gymnasium": gymnasium.__version__,
            "reward_function_version": self.config.reward_function_version,
            "horizon": self.horizon,
            "goals_per_task": self.config.goals_per_task,
            "goal_seed": self.config.goal_seed,
            "tasks": ",".join(self.task_names),
        }

    @property
    def goals(self) -> tuple[npt.NDArray[np.float64], ...]:
        """The fixed goals, one array ``[goals_per_task, size]`` per task."""
        config = self.config
        one_stream = config.benchmark in _ONE_STREAM
        return make_goals(self.task_names, config.goal_seed, config.goals_per_task, one_stream, self.fast)

    def make_engine(self, envs_per_task: int, seed: int, evaluation: bool = False) -> SlotEngine:
        """See ``Suite.make_engine``; evaluation episode ``k`` of a task has goal ``k % goals_per_task``."""
        config = self.config
        factory = MetaWorldFactory(
            self.task_names, self.goals, config.reward_function_version, self.horizon, self.fast
        )
        engine = SlotEngine(
            factory,
            step_seconds=[STEP_MICROSECONDS[name] * 1e-6 for name in self.task_names],
            envs_per_task=envs_per_task,
            observation_size=_OBSERVATION_SIZE,
            action_space=self.action_space,
            seed=seed,
            evaluation=evaluation,
            workers=config.workers,
            processes=self._workers,
        )
        if engine.workers > 1:
            forget_models()  # the goals were drawn here, but the environments live elsewhere
        return engine
