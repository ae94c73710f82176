"""Evaluation: deterministic actions on the posterior mean, a fixed number of episodes per task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from varshare_rl.algorithms.base import Algorithm, EvaluationPolicy
from varshare_rl.envs.suite import Suite, VectorEngine
from varshare_rl.nn.layer import penalized_layers
from varshare_rl.run.process import load_rng_state, one_thread, rng_state


@dataclass(frozen=True)
class Evaluation:
    """Means over a task's episodes, by task name.

    Attributes:
        tasks: ``{name: {success, success_final, return, episode_steps, kl}}``; the successes are None in a
            suite that has none. ``success`` is 1 for an episode in which any step succeeded, ``success_final``
            looks at its last step only; ``kl`` is the nats of all networks, None without penalised layers.
    """

    tasks: dict[str, dict[str, float | None]]

    def mean(self, name: str) -> float | None:
        """Return the mean over tasks, or None where a task has no such number."""
        values = [row[name] for row in self.tasks.values()]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if len(known) == len(values) else None

    @property
    def score(self) -> tuple[float, float, float]:
        """Measure of the best checkpoint.

        Number of tasks with a finite return, then their mean success where there is one, then their mean return.
        """
        rows = [row for row in self.tasks.values() if row["return"] is not None and math.isfinite(row["return"])]
        means = [
            float(np.mean([row[name] for row in rows])) if rows and self.mean(name) is not None else 0.0
            for name in ("success", "return")
        ]
        return (float(len(rows)), means[0], means[1])

    def metrics(self) -> dict[str, float]:
        """``eval/<task>/<name>`` and ``eval/mean_<name>``, and ``kl/<task>``."""
        metrics: dict[str, float] = {}
        for task, row in self.tasks.items():
            for name, value in row.items():
                if value is not None:
                    metrics[f"kl/{task}" if name == "kl" else f"eval/{task}/{name}"] = value
        for name in ("success", "success_final", "return", "episode_steps"):
            mean = self.mean(name)
            if mean is not None:
                metrics[f"eval/mean_{name}"] = mean
        return metrics


class EvaluationStopped(Exception):
    """An evaluation was stopped before its end."""


@dataclass
class EpisodeCursor:
    """Position in the episodes of an engine, so that every :func:`play` on it sees further ones.

    Attributes:
        obs: observation that every slot acts on next, ``[T, E, F]``; None before the first play.
        within: slots in the middle of an episode, ``[T, E]``, which does not count in the next play.
    """

    obs: npt.NDArray[np.float32] | None = None
    within: npt.NDArray[np.bool_] | None = None


class PerTaskPolicies:
    """Policies of one task each, acting together as one policy of ``T`` tasks.

    Args:
        makers: of every task in order, makes its policy for a number of environments.
        envs_per_task: that number.
    """

    def __init__(self, makers: Sequence[Callable[[int], EvaluationPolicy]], envs_per_task: int) -> None:
        self.policies = [make(envs_per_task) for make in makers]

    def act(self, obs: Tensor) -> Tensor:
        """Return actions ``[T, E, ...]`` for ``[T, E, F]``."""
        return torch.cat([policy.act(obs[task : task + 1]) for task, policy in enumerate(self.policies)])

    def observe(self, done: Tensor) -> None:
        """Take note of the episodes that have ended, ``[T, E]``."""
        for task, policy in enumerate(self.policies):
            policy.observe(done[task : task + 1])


@torch.no_grad()
def layer_kl(modules: dict[str, nn.Module]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the nats per task ``[T]`` of every layer that has any, by ``<module>.<layer>``."""
    return {
        f"{name}.{path}": layer.kl().double().cpu().numpy()
        for name, module in modules.items()
        for path, layer in penalized_layers(module)
    }


def evaluate(
    algorithm: Algorithm,
    suite: Suite,
    engine: VectorEngine,
    episodes: int,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Run :func:`play` with the algorithm's own policy, and add the nats of its networks."""
    device = next(next(iter(algorithm.trained_modules().values())).parameters()).device
    tasks = play(algorithm.evaluation_policy, suite, engine, episodes, device, stop=stop)
    layers = layer_kl(algorithm.trained_modules())
    for index, row in enumerate(tasks.values()):
        row["kl"] = float(sum(nats[index] for nats in layers.values())) if layers else None
    return Evaluation(tasks)


@one_thread()
def play(
    make_policy: Callable[[int], EvaluationPolicy],
    suite: Suite,
    engine: VectorEngine,
    episodes: int,
    device: torch.device,
    cursor: EpisodeCursor | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, float | None]]:
    """Run ``episodes`` episodes of every task; means as in :class:`Evaluation`.

    ``make_policy`` makes the policy for a number of environments per task. Episodes are always from the same
    starts, but with a ``cursor``, which they go on from.

    Leaves torch's random state as it was, whatever draws of weights the policy makes.

    Episode ``j`` of slot ``e`` is episode ``j * E + e`` of its task; slots step on until every task has its
    episodes, and what comes after is not counted, so short episodes are not favoured.

    Raises:
        EvaluationStopped: ``stop``, asked before every step, says so.
    """
    num_tasks, envs = engine.num_tasks, engine.envs_per_task
    totals = {name: np.zeros((num_tasks, episodes)) for name in ("return", "episode_steps")}
    flags = {name: np.zeros((num_tasks, episodes), dtype=bool) for name in ("success", "success_final")}
    episode = np.tile(np.arange(envs), (num_tasks, 1))  # the episode that each slot is in, [T, E]
    task = np.arange(num_tasks)[:, None].repeat(envs, 1)
    cursor = EpisodeCursor() if cursor is None else cursor
    if cursor.obs is None or cursor.within is None:
        obs = engine.reset()
    else:
        obs, episode = cursor.obs, episode - envs * cursor.within
    random = rng_state()
    policy = make_policy(envs)
    while (episode < episodes).any():
        if stop():
            load_rng_state(random)
            raise EvaluationStopped
        step = engine.step(policy.act(torch.from_numpy(obs).to(device)).cpu().numpy())
        policy.observe(torch.from_numpy(step.terminated | step.truncated))
        obs = step.obs
        open_slots = (episode >= 0) & (episode < episodes)
        where = (task[open_slots], episode[open_slots])
        totals["return"][where] += step.reward[open_slots]
        totals["episode_steps"][where] += 1
        flags["success"][where] |= step.success[open_slots]
        flags["success_final"][where] = step.success[open_slots]
        ended = step.terminated | step.truncated
        episode[ended] += envs
        cursor.obs, cursor.within = obs, ~ended
    load_rng_state(random)
    tasks: dict[str, dict[str, float | None]] = {}
    for index, name in enumerate(suite.task_names):
        row: dict[str, Any] = {key: float(value[index].mean()) for key, value in totals.items()}
        for key, value in flags.items():
            row[key] = float(value[index].mean()) if suite.has_success else None
        tasks[name] = row
    return tasks
