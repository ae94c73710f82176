"""Environments of your own as the tasks of one agent: ``python examples/own_environments.py``."""

import sys
from typing import Any

import gymnasium as gym
import numpy as np

import varshare_rl as vs


class Walk(gym.Env[Any, Any]):
    """A point on a line that should go to a goal it does not see."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-0.2, 0.2, (1,), np.float32)

    def __init__(self, goal: float) -> None:
        self.goal = goal

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.5, 0.5, 1).astype(np.float32)
        return self.x, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.x = self.x + action
        distance = float(abs(self.x[0] - self.goal))
        return self.x, -distance, False, False, {"success": distance < 0.1}


if __name__ == "__main__":
    budget = int(sys.argv[1]) if len(sys.argv) > 1 else 8_000
    tasks = {"left": lambda: Walk(-1.0), "right": lambda: Walk(1.0)}
    options = {"env": {"horizon": 20, "envs_per_task": 8}, "algorithm": {"rollout_transitions_per_task": 400}}
    agent = vs.train(envs=tasks, total_transitions=budget, device="cpu", **options)
    print("at 0:", {task: agent.predict(np.zeros(1), task) for task in agent.tasks})
    print("success:", {task: row["success"] for task, row in agent.evaluate(episodes=10)["tasks"].items()})
