"""What a sequence of tasks has found, and how it is written down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from varshare_rl.continual.config import ContinualConfig, TaskIds
from varshare_rl.continual.parts import SequenceTask
from varshare_rl.reporting.continual_measures import measures
from varshare_rl.run.results import scores
from varshare_rl.run.tracker import METRICS_FILE
from varshare_rl.types import Tree


@dataclass
class Progress:
    """What a sequence has found so far, all of it in its checkpoint.

    Attributes:
        rows: evaluations of all tasks, before learning and after every task.
        curves: success (or return) against transitions of every task that was learnt.
        costs: parameters, seconds and bytes of every task that was learnt.
        normalizers: statistics of observations that each learnt task's policy has.
        carried: what the next task takes over from the last one's training.
        seconds: of everything.
    """

    rows: list[dict[str, list[float | None]]] = field(default_factory=list)
    curves: list[dict[str, list[float]]] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    normalizers: list[dict[str, Tensor]] = field(default_factory=list)
    carried: Tree | None = None
    seconds: float = 0.0

    @property
    def transitions(self) -> int:
        """Of all training."""
        return sum(cost["transitions"] for cost in self.costs)


def measure(places: Sequence[SequenceTask]) -> str:
    """``success`` where all suites have it, otherwise ``return``."""
    return "success" if all(place.suite.has_success for place in places) else "return"


def read_curve(folder: Path, name: str, curve: dict[str, list[float]]) -> None:
    """Append the evaluations that a task's training has logged as ``name``."""
    for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if name in entry:
            curve["transitions"].append(float(entry["transitions"]))
            curve["success"].append(float(entry[name]))


def document(
    config: ContinualConfig, places: Sequence[SequenceTask], progress: Progress, provenance: dict[str, Any]
) -> dict[str, Any]:
    """What ``summary.json`` says, and :mod:`varshare_rl.reporting.continual_measures` reads."""
    found: dict[str, Any] = {
        "format": "continual",
        "method": config.method.name,
        "algorithm": config.algorithm.name,
        "suite": places[-1].suite.name,
        "tasks": [place.name for place in places],
        "old_tasks": len(places) - len(progress.costs),
        "task_ids": config.task_ids.value,
        "carried": {
            "critic": config.carry.critic.value,
            "optimizer": config.carry.optimizer,
            "replay": config.carry.replay,
        },
        "measure": measure(places),
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
    places: Sequence[SequenceTask],
    progress: Progress,
    acting: Sequence[int | None],
    played: Sequence[Mapping[str, float | None]],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """What ``evaluation.json`` says of a sequence.

    ``acted_as`` has for every task the learnt one whose policy acted; null: an untrained policy.
    """
    names = [place.name for place in places]
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
