"""Tasks of the package ``metaworld``: their fixed goals, and single environments."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.types import Task

from varshare_rl.envs.pictures import render
from varshare_rl.envs.sawyer import OBSERVATION_SIZE
from varshare_rl.envs.sawyer.fast import FastMetaWorldEnv, environment_classes
from varshare_rl.envs.slots import Array, Episode, TaskEnv, TimedEnv


@lru_cache(maxsize=8)
def make_goals(
    names: tuple[str, ...], seed: int, goals_per_task: int, one_stream: bool, fast: bool = False
) -> tuple[npt.NDArray[np.float64], ...]:
    """The fixed goals of each task, ``[goals, size]``, the same that the package draws with this seed.

    ``one_stream`` draws all tasks one after the other from one seeded stream, as ``metaworld.MT10(seed)``
    does; otherwise task ``k`` starts its own stream from ``seed + k``, as the package's custom list of tasks
    does. The package simulates the arm at every draw, which the goals do not depend on; here it is left out.
    ``fast`` compiles models where ``varshare_rl.envs.sawyer.fast`` finds them again.
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
    env._get_obs = lambda: np.zeros(OBSERVATION_SIZE)
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
    """One Meta-World task (a ``TaskEnv``). Training draws a goal per episode, evaluation sweeps."""

    def __init__(
        self,
        name: str,
        goals: npt.NDArray[np.float64],
        reward_version: str,
        horizon: int,
        picture: Mapping[str, Any] | None = None,
    ) -> None:
        self._env: Any = ALL_V3_ENVIRONMENTS[name](reward_function_version=reward_version, **(picture or {}))
        self._env.max_path_length = horizon
        quality = self._env.model.vis.quality
        quality.shadowsize = quality.offsamples = 0  # without a GPU a picture would take ten times as long
        self._tasks = as_tasks(name, goals)

    def reset(self, episode: Episode) -> Array:
        self._env.set_task(self._tasks[episode.choose(len(self._tasks))])
        observation: Array = self._env.reset()[0]
        return observation

    def step(self, action: Array) -> tuple[Array, float, bool, bool, bool]:
        obs, reward, terminated, truncated, info = self._env.step(action)
        return obs, float(reward), terminated, truncated, info["success"] == 1.0

    def render(self) -> npt.NDArray[np.uint8]:
        frame: npt.NDArray[np.uint8] = render(self._env)
        return frame[::-1, ::-1]  # the package's cameras hang upside down

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
    observe_time: bool = False
    picture: Mapping[str, Any] | None = None  # arguments of environments that can be rendered

    def __call__(self, task: int) -> TaskEnv:
        name, goals = self.names[task], self.goals[task]
        env: TaskEnv
        if self.fast and self.picture is None:
            env = FastMetaWorldEnv(name, goals, self.horizon)
        else:
            env = MetaWorldEnv(name, goals, self.reward_version, self.horizon, self.picture)
        return TimedEnv(env, self.horizon) if self.observe_time else env
