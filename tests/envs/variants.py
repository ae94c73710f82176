"""Small gymnasium environments, wrappers and makers that worker processes can import."""

from __future__ import annotations

import random
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete


class Line(gymnasium.Env[Any, Any]):
    """A position in float64 that the action moves; reaching beyond ``goal`` is the success."""

    def __init__(self, size: int = 2, goal: float = 1.0, key: str | None = "success") -> None:
        self.observation_space = Box(-np.inf, np.inf, (size,), np.float64)
        self.action_space: Any = Box(np.array([-2.0, 0.0]), np.array([2.0, 1.0]), dtype=np.float64)
        self.goal, self.key = goal, key

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(-0.1, 0.1))
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.x += float(action[0])
        info = {} if self.key is None else {self.key: self.x > self.goal}
        return self._obs(), float(action[1]), False, False, info

    def _obs(self) -> Any:
        return np.full(self.observation_space.shape, self.x)


class Choices(gymnasium.Env[Any, Any]):
    """Rewards the number of the choice; the first one is -1."""

    observation_space = Box(0.0, 1.0, (1,), np.float32)
    action_space = Discrete(3, start=-1)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        return np.zeros(1, np.float32), float(action), False, False, {}


class Doubled(gymnasium.RewardWrapper[Any, Any]):
    """Twice the reward."""

    def reward(self, reward: Any) -> Any:
        return 2 * reward


def short() -> Line:
    return Line()


def long() -> Line:
    return Line(size=3)


class Worn(Line):
    """Every step that it has ever made, through all resets, adds to its rewards."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        obs, reward, *rest = super().step(action)
        return obs, reward + self.steps, *rest  # type: ignore[return-value]


class Dice(Line):
    """Draws its rewards from the global generators, and its goal too when it is made."""

    def __init__(self) -> None:
        super().__init__(goal=np.random.random())  # noqa: NPY002

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, *rest = super().step(action)
        return obs, np.random.random() + random.random() + self.goal, *rest  # type: ignore[return-value]  # noqa: NPY002


class Weather(Line):
    """Follows no seed."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, *rest = super().step(action)
        return obs, float(np.random.default_rng().random()), *rest  # type: ignore[return-value]


class Loose(Line):
    """A Line that hands out observations and rewards in forms of their own."""

    def __init__(self, form: Any = np.array, reward: Any = float, actions: Any = None) -> None:
        super().__init__()
        self.form, self.give = form, reward
        self.action_space = actions or self.action_space

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        obs, *rest = super().step(np.array([0.5, action.reshape(-1)[0]]))
        return self.form(obs), self.give(rest[0]), *rest[1:]  # type: ignore[return-value]
