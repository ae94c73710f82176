"""Returns and successes of finished training episodes, per task."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from varshare_rl.state import Stateful
from varshare_rl.types import Metrics


class EpisodeStatistics(Stateful):
    """Running episodes of every slot and the last ``window`` finished ones of every task, their returns finite.

    Args:
        task_names: names in task order.
        envs_per_task: ``E``.
        window: finished episodes per task to average over.
        staggered: the first episodes are cut, see ``Suite.staggered``, and do not count.
    """

    state_fields = (
        "running_return", "running_success", "running_steps", "returns", "successes", "lengths", "cut?",
    )  # fmt: skip

    def __init__(
        self, task_names: tuple[str, ...], envs_per_task: int, window: int = 20, staggered: bool = False
    ) -> None:
        self.task_names, self.window = task_names, window
        shape = (len(task_names), envs_per_task)
        self.running_return = np.zeros(shape)
        self.running_success = np.zeros(shape, dtype=bool)
        self.running_steps = np.zeros(shape, dtype=np.int64)
        self.cut = np.zeros(shape, dtype=bool)  # running episodes that do not count
        self.cut[:, :-1] = staggered
        self.returns: list[list[float]] = [[] for _ in task_names]
        self.successes: list[list[float]] = [[] for _ in task_names]
        self.lengths: list[list[float]] = [[] for _ in task_names]

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
            if self.cut[task, env] or not np.isfinite(self.running_return[task, env]):
                continue
            for finished, running in (
                (self.returns, self.running_return),
                (self.successes, self.running_success),
                (self.lengths, self.running_steps),
            ):
                finished[task] = [*finished[task], float(running[task, env])][-self.window :]
        self.forget(done)

    def forget(self, done: npt.NDArray[np.bool_]) -> None:
        """Begin anew in some slots, ``[T, E]``; what their running episodes came to does not count."""
        self.running_return[done] = 0.0
        self.running_success[done] = False
        self.running_steps[done] = 0
        self.cut[done] = False

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
