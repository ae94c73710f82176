"""Small environments for the tests of the engine, and how to make and follow one."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box

from varshare_rl.envs.engine import SlotEngine
from varshare_rl.envs.slots import Episode
from varshare_rl.envs.workers import Workers

BOX = Box(-1.0, 1.0, (2,), np.float32)


class Walk:
    """Position moved by the action and the seed's noise; ends beyond 5 or after ``task + 3`` steps."""

    def __init__(self, task: int, fail_at: int, noise: bool, sleep: float) -> None:
        self.task, self.fail_at, self.noise, self.sleep = task, fail_at, noise, sleep
        self.rng: Any = None

    def reset(self, episode: Episode) -> np.ndarray:
        self.rng = np.random.default_rng(episode.seed if self.noise else None)
        self.sweep = -1.0 if episode.sweep is None else float(episode.sweep)
        self.x, self.steps = float(self.rng.normal()), 0
        return np.array([self.x, self.steps, self.sweep])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        self.steps += 1
        time.sleep(self.sleep)
        if self.steps == self.fail_at:
            raise RuntimeError("the walker tripped")
        if self.steps == -self.fail_at:
            os._exit(3)
        self.x += float(action.sum()) + 0.01 * float(self.rng.normal())
        over, late = self.x > 5, self.steps >= self.task + 3
        return np.array([self.x, self.steps, self.sweep]), self.x, over, late, over

    def close(self) -> None:
        self.rng = None


@dataclass(frozen=True)
class WalkFactory:
    fail_at: int = 0
    noise: bool = True
    sleep: float = 0.0

    def __call__(self, task: int) -> Walk:
        return Walk(task, self.fail_at, self.noise, self.sleep)


def make(
    workers: int = 1,
    evaluation: bool = False,
    envs: int = 2,
    seed: int = 7,
    processes: Workers | None = None,
    stagger: int = 0,
    **kwargs: Any,
) -> SlotEngine:
    return SlotEngine(
        WalkFactory(**kwargs),
        step_seconds=[1e-3, 3e-3, 1e-3],
        envs_per_task=envs,
        observation_size=3,
        action_space=BOX,
        seed=seed,
        evaluation=evaluation,
        workers=workers,
        processes=processes,
        stagger=stagger,
    )


def actions(step: int, envs: int = 2) -> np.ndarray:
    return np.random.default_rng(step).uniform(-1, 1, (3, envs, 2)).astype(np.float32)


def trace(engine: SlotEngine, start: int, stop: int) -> list[np.ndarray]:
    out = []
    for k in range(start, stop):
        s = engine.step(actions(k, engine.envs_per_task))
        out += [s.obs, s.next_obs, s.reward, s.terminated, s.truncated, s.success, s.task_id]
    return out


def assert_same(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
