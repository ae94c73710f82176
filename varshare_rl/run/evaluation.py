"""Evaluation: a fixed number of episodes per task, by default with deterministic actions on the posterior mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from varshare_rl.algorithms.base import Algorithm, EvaluationPolicy
from varshare_rl.envs.suite import Suite, VectorEngine
from varshare_rl.nn.layer import penalized_layers
from varshare_rl.run.process import one_thread, own_random

#: Means over a task's episodes by task, see :class:`Evaluation`.
Means = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Evaluation:
    """Means over a task's episodes, by task name.

    Attributes:
        tasks: ``{name: {success, success_final, return, episode_steps, kl}}``; the successes are None in a
            suite that has none. ``success`` is 1 for an episode in which any step succeeded, ``success_final``
            looks at its last step only; ``kl`` is the nats of all networks, None without penalised layers.
    """

    tasks: Means

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


#: Headings of means over episodes on a screen.
HEADINGS = {
    "success": "success", "success_final": "final", "return": "return", "episode_steps": "steps", "kl": "nats",
}  # fmt: skip


def shown(tasks: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Return rows of a table with short headings, without the columns that no task has a number in."""
    kept = [name for name in HEADINGS if any(row.get(name) is not None for row in tasks.values())]
    return {task: {HEADINGS[name]: row.get(name) for name in kept} for task, row in tasks.items()}


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
    deterministic: bool = True,
) -> Evaluation:
    """Run :func:`play` with the algorithm's own policy, and add the nats of its networks."""
    make_policy = partial(algorithm.evaluation_policy, deterministic=deterministic)
    tasks = play(make_policy, suite, engine, episodes, device_of(algorithm), stop=stop)
    return with_kl(algorithm, tasks)


def evaluate_officially(
    algorithm: Algorithm, suite: Suite, episodes: int, seed: int, deterministic: bool = True
) -> Evaluation:
    """Evaluate with the protocol of the suite's authors, see :meth:`Suite.official_evaluation`.

    Raises:
        UserError: the suite has none.
    """
    device = device_of(algorithm)

    with own_random(seed), one_thread():
        policy = algorithm.evaluation_policy(1, deterministic)

        def act(obs: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
            return policy.act(torch.from_numpy(obs).to(device)[:, None])[:, 0].cpu().numpy()

        def ended(done: npt.NDArray[np.bool_]) -> None:
            policy.observe(torch.from_numpy(done)[:, None])

        tasks: Means = {
            name: {**row} for name, row in suite.official_evaluation(act, ended, episodes, seed).items()
        }
    return with_kl(algorithm, tasks)


def device_of(algorithm: Algorithm) -> torch.device:
    """Return the device that an algorithm's networks are on."""
    return next(next(iter(algorithm.trained_modules().values())).parameters()).device


def with_kl(algorithm: Algorithm, tasks: Means) -> Evaluation:
    """Add the nats of all networks to means over episodes."""
    layers = layer_kl(algorithm.trained_modules())
    for index, row in enumerate(tasks.values()):
        row["kl"] = float(sum(nats[index] for nats in layers.values())) if layers else None
    return Evaluation(tasks)


@one_thread()
@own_random()
def play(
    make_policy: Callable[[int], EvaluationPolicy],
    suite: Suite,
    engine: VectorEngine,
    episodes: int,
    device: torch.device,
    cursor: EpisodeCursor | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Means:
    """Run ``episodes`` episodes of every task; means as in :class:`Evaluation`.

    ``make_policy`` makes the policy for a number of environments per task. Episodes are always from the same
    starts, but with a ``cursor``, which they go on from.

    Leaves all generators as they were, whatever the policy and the environments draw.

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
    policy = make_policy(envs)
    while (episode < episodes).any():
        if stop():
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
    tasks: Means = {}
    for index, name in enumerate(suite.task_names):
        row: dict[str, Any] = {key: float(value[index].mean()) for key, value in totals.items()}
        for key, value in flags.items():
            row[key] = float(value[index].mean()) if suite.has_success else None
        tasks[name] = row
    return tasks
