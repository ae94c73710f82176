"""Gymnasium's LunarLander-v3 in variants: standard, windy and heavy.

An episode succeeds when its return reaches 200, the score that the environment's authors call a solution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
from gymnasium.spaces import Box, Discrete

from varshare_rl.envs.engine import SlotEngine
from varshare_rl.envs.gymnasium_suite import GymnasiumConfig, GymnasiumFactory, GymnasiumSuite
from varshare_rl.envs.slots import Array, Episode, TaskEnv
from varshare_rl.envs.workers import Workers
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.registry import register

SOLVED_RETURN = 200.0
#: One step of one environment, roughly.
_STEP_SECONDS = 1e-4

#: Constructor arguments per variant. Gymnasium allows gravity in (-12, 0); its default is -10.
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    "windy": {"enable_wind": True, "wind_power": 15.0, "turbulence_power": 1.5},
    "heavy": {"gravity": -11.9},
}


@register("env", "lunarlander")
@dataclass
class LunarLanderConfig:
    """``env=lunarlander``: Gymnasium's LunarLander-v3 as it is, windy, and heavy."""

    name: str = "lunarlander"
    tasks: list[str] = field(default_factory=lambda: list(VARIANTS))
    "Any of `standard`, `windy`, `heavy`."
    continuous: bool = False
    "Throttle (Box) in place of on and off (Discrete)."
    envs_per_task: int = bounded(1, least=1)
    "Environments of every task."
    workers: int = bounded(0, least=0)
    "Processes that step the environments; 0: as many as pay, 1: this one."
    horizon: int = bounded(1000, least=1)
    "Steps until an episode is truncated."

    def build(self) -> LunarLanderSuite:
        """The suite. Raises UserError for impossible options."""
        return LunarLanderSuite(self)


class LunarLanderEnv:
    """Adds the success flag, raised on the last step, to one lander (``varshare_rl.envs.slots.TaskEnv``)."""

    def __init__(self, env: TaskEnv) -> None:
        self._env = env
        self._return = 0.0

    def reset(self, episode: Episode) -> Array:
        self._return = 0.0
        return self._env.reset(episode)

    def step(self, action: Array) -> tuple[Array, float, bool, bool, bool]:
        obs, reward, terminated, truncated, _ = self._env.step(action)
        self._return += reward
        success = (terminated or truncated) and self._return >= SOLVED_RETURN
        return obs, reward, terminated, truncated, success

    def close(self) -> None:
        self._env.close()


@dataclass(frozen=True)
class LunarLanderFactory:
    """Makes the environment of a task; sent to the workers."""

    inner: GymnasiumFactory

    def __call__(self, task: int) -> LunarLanderEnv:
        return LunarLanderEnv(self.inner(task))


class LunarLanderSuite:
    """The suite (``varshare_rl.envs.suite.Suite``). Raises SuiteError for impossible options."""

    has_success = True

    def __init__(self, config: LunarLanderConfig) -> None:
        names = tuple(config.tasks)
        for name in names:
            if name not in VARIANTS:
                raise UserError(f"unknown LunarLander task {name!r}: choose from {', '.join(VARIANTS)}")
        if len(set(names)) != len(names) or not names:
            raise UserError(f"LunarLander tasks [{', '.join(names)}]: list one or more, each once")
        self._inner = GymnasiumSuite(
            GymnasiumConfig(name=config.name, ids=["LunarLander-v3"] * len(names), horizon=config.horizon),
            names,
            tuple(VARIANTS[name] | {"continuous": config.continuous} for name in names),
        )
        self.name = config.name
        self.config = config
        self.task_names = names
        self.observation_space: Box = self._inner.observation_space
        self.action_space: Box | Discrete = self._inner.action_space
        self.action_mask = self._inner.action_mask
        self.horizon = self._inner.horizon
        self._workers = Workers()

    @property
    def provenance(self) -> Mapping[str, str | int | float | bool | None]:
        """Versions, tasks, horizon and the meaning of success."""
        return {
            "suite": self.name,
            "gymnasium": gymnasium.__version__,
            "tasks": ",".join(self.task_names),
            "continuous": self.config.continuous,
            "horizon": self.horizon,
            "success": f"return >= {SOLVED_RETURN:g}",
        }

    def make_engine(self, envs_per_task: int, seed: int, evaluation: bool = False) -> SlotEngine:
        """See ``Suite.make_engine``."""
        return SlotEngine(
            LunarLanderFactory(self._inner.factory),
            step_seconds=[_STEP_SECONDS] * len(self.task_names),
            envs_per_task=envs_per_task,
            observation_size=self.observation_space.shape[0],
            action_space=self.action_space,
            seed=seed,
            evaluation=evaluation,
            workers=self.config.workers,
            processes=self._workers,
        )
