"""Returns and successes of finished training episodes, per task."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from varshare_rl.types import Metrics, Tree


class EpisodeStatistics:
    """Running episodes of every slot and the last ``window`` finished ones of every task.

    Args:
        task_names: names in task order.
        envs_per_task: ``E``.
        window: finished episodes per task to average over.
    """

    def __init__(self, task_names: tuple[str, ...], envs_per_task: int, window: int = 20) -> None:
        self.task_names = task_names
        shape = (len(task_names), envs_per_task)
        self.running_return = np.zeros(shape)
        self.running_success = np.zeros(shape, dtype=bool)
        self.running_steps = np.zeros(shape, dtype=np.int64)
        self.returns: list[deque[float]] = [deque(maxlen=window) for _ in task_names]
        self.successes: list[deque[float]] = [deque(maxlen=window) for _ in task_names]
        self.lengths: list[deque[float]] = [deque(maxlen=window) for _ in task_names]

    def add(
        self, reward: npt.NDArray[np.float32], success: npt.NDArray[np.bool_], done: npt.NDArray[np.bool_]
    ) -> None:
        """Take in one vector step, each ``[T, E]``; an episode succeeds if any of its steps did."""
        self.running_return += reward
        self.running_success |= success
        self.running_steps += 1
        if not done.any():
            return
        for task, env in np.argwhere(done):
            self.returns[task].append(float(self.running_return[task, env]))
            self.successes[task].append(float(self.running_success[task, env]))
            self.lengths[task].append(float(self.running_steps[task, env]))
        self.running_return[done] = 0.0
        self.running_success[done] = False
        self.running_steps[done] = 0

    def metrics(self, with_success: bool) -> Metrics:
        """``train/<task>/{return,success,episode_steps}`` of tasks with a finished episode, and their means."""
        kinds = {"return": self.returns, "episode_steps": self.lengths}
        if with_success:
            kinds["success"] = self.successes
        metrics: Metrics = {}
        for kind, windows in kinds.items():
            means = {name: float(np.mean(w)) for name, w in zip(self.task_names, windows, strict=True) if w}
            metrics.update({f"train/{name}/{kind}": mean for name, mean in means.items()})
            if means:
                metrics[f"train/mean_{kind}"] = float(np.mean(list(means.values())))
        return metrics

    def state(self) -> Tree:
        """Everything, for a checkpoint."""
        return {
            "running_return": self.running_return,
            "running_success": self.running_success,
            "running_steps": self.running_steps,
            "returns": [list(w) for w in self.returns],
            "successes": [list(w) for w in self.successes],
            "lengths": [list(w) for w in self.lengths],
        }

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.running_return = state["running_return"]
        self.running_success = state["running_success"]
        self.running_steps = state["running_steps"]
        for windows, saved in (
            (self.returns, state["returns"]),
            (self.successes, state["successes"]),
            (self.lengths, state["lengths"]),
        ):
            for window, values in zip(windows, saved, strict=True):
                window.clear()
                window.extend(values)
