"""Results of a sequence of tasks, and the documents that they are written to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from varshare_rl.continual.config import ContinualConfig, TaskIds
from varshare_rl.continual.tasks import SequenceTask, measure
from varshare_rl.reporting.continual_measures import measures
from varshare_rl.run.results import scores
from varshare_rl.run_files import METRICS_FILE
from varshare_rl.types import Tree


@dataclass
class Progress:
    """Results of a sequence so far, all of them in its checkpoint.

    Attributes:
        rows: evaluations of all tasks, before learning and after every task.
        curves: success (or return) against transitions of every task that was learnt.
        costs: parameters, seconds and bytes of every task that was learnt.
        normalizers: statistics of observations that each learnt task's policy has.
        log_stds: log standard deviation of each learnt task's policy, ``[1, A]``; empty where it is no parameter.
        units: those of the critic of each task of the sequence that was learnt; empty where it was not trained.
        carried: state of the last task's training that the next one takes over.
        seconds: of everything.
    """

    rows: list[dict[str, list[float | None]]] = field(default_factory=list)
    curves: list[dict[str, list[float]]] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    normalizers: list[dict[str, Tensor]] = field(default_factory=list)
    log_stds: list[Tensor] = field(default_factory=list)
    units: list[dict[str, Tensor]] = field(default_factory=list)
    carried: Tree | None = None
    seconds: float = 0.0

    @property
    def transitions(self) -> int:
        """Transitions of all training."""
        return sum(cost["transitions"] for cost in self.costs)


def logged_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Read the evaluations that the training on a task has logged in its folder."""
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "eval/mean_return" in entry]


def average(
    row: Mapping[str, list[float | None]],
    learnt: Sequence[str],
    logged: Sequence[Mapping[str, float]],
    evaluations: int,
) -> None:
    """Make results of the learnt tasks, in place, means over the last evaluations of the newest one's training.

    Args:
        row: results of all tasks after it, by name.
        learnt: names of the learnt tasks, in order.
        logged: evaluations of its training, which end with one that ``row`` repeats.
        evaluations: number to average, that of ``row`` included.
    """
    earlier = [entry for entry in logged[:-1] if entry["transitions"] > 0]
    earlier = earlier[len(earlier) - (evaluations - 1) :]
    keys = [f"continual/{task}/" for task in learnt[:-1]] + ["eval/mean_"]
    for name, values in row.items():
        for number, (key, value) in enumerate(zip(keys, values, strict=False)):
            if value is not None:
                values[number] = (value + sum(entry[key + name] for entry in earlier)) / (1 + len(earlier))


def document(
    config: ContinualConfig, tasks: Sequence[SequenceTask], progress: Progress, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Make the document of ``summary.json``, which :mod:`varshare_rl.reporting.continual_measures` reads."""
    found: dict[str, Any] = {
        "format": "continual",
        "method": config.method.name,
        "algorithm": config.algorithm.name,
        "suite": tasks[-1].suite.name,
        "tasks": [task.name for task in tasks],
        "old_tasks": len(tasks) - len(progress.costs),
        "task_ids": config.task_ids.value,
        "averaged_evaluations": config.averaged_evaluations,
        "carried": {**vars(config.carry), "critic": config.carry.critic.value},
        "measure": measure(tasks),
        "success": [row["success"] for row in progress.rows],
        "return": [row["return"] for row in progress.rows],
        "curves": progress.curves,
        "per_task": progress.costs,
        "transitions": progress.transitions,
        "seconds": round(progress.seconds, 3),
        "conditions": provenance,
    }
    if config.task_ids is TaskIds.hidden:
        found["acted_as"] = [row["acted_as"] for row in progress.rows]
    found["measures"] = measures(found)
    return found


def evaluation_document(
    config: ContinualConfig,
    tasks: Sequence[SequenceTask],
    progress: Progress,
    acting: Sequence[int | None],
    played: Sequence[Mapping[str, float | None]],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Make the document of ``evaluation.json`` of a sequence.

    ``acted_as`` has for every task the learnt one whose policy acted; null: an untrained policy.
    """
    names = [task.name for task in tasks]
    return {
        **scores(dict(zip(names, played, strict=True))),
        "acted_as": {
            name: None if number is None else names[number] for name, number in zip(names, acting, strict=True)
        },
        "method": config.method.name,
        "task_ids": config.task_ids.value,
        "learnt": names[: len(progress.normalizers)],
        "transitions": progress.transitions,
        "seconds": round(progress.seconds, 3),
        "conditions": provenance,
    }
