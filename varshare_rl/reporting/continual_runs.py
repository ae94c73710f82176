"""Finished continual runs: finding and reading them, and checks that they may stand in one table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from varshare_rl.errors import UserError
from varshare_rl.reading import read_json, read_yaml, reading
from varshare_rl.reporting.continual_measures import measures, original_name
from varshare_rl.run_files import CONFIG_FILE, SUMMARY_FILE

FORMAT = "continual"
SWEEP_FILE = "multirun.yaml"  # Hydra's, among the runs of a sweep
#: Entries of the conditions that make tasks of one name the same tasks.
TASK_CONDITIONS = ("horizon", "reward_function_version", "goals_per_task", "variant_set", "reward_scales")
#: Groups of the configuration in which runs of one method may differ; they then stand apart in the table.
OPTION_GROUPS = ("method", "algorithm", "network", "critic", "elbo", "optimizer")
#: Budgets count as equal when they differ by less than this share: runs end with whole steps of all environments.
BUDGET_TOLERANCE = 0.01


class ContinualRun(NamedTuple):
    """A run folder, the document in it, and options that it was made with, by their dotted names."""

    folder: Path
    document: dict[str, Any]
    config: dict[str, str]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.document["conditions"]["seed"])

    @property
    def learnt(self) -> list[str]:
        """Names of the tasks that the run learnt, in order."""
        return list(self.document["tasks"][self.document["old_tasks"] :])

    @property
    def budgets(self) -> list[int]:
        """Transitions of each learnt task."""
        return [int(entry["transitions"]) for entry in self.document["per_task"]]


def read_continual_runs(folders: Iterable[str]) -> list[ContinualRun]:
    """Read the runs in ``folders``, each that of a run or one that holds such folders (of a sweep), each run once.

    Raises:
        UserError: a folder is neither, or a run's summary is damaged.
    """
    found: dict[Path, ContinualRun] = {}
    for folder in folders:
        for run_dir in _run_folders(Path(folder)):
            found.setdefault(run_dir.resolve(), _read(run_dir))
    return list(found.values())


def check_comparable(runs: Sequence[ContinualRun], labels: Sequence[str]) -> None:
    """Refuse to compare runs that differ in more than what ``labels`` say and the seed.

    Raises:
        UserError: two runs differ in suite, algorithm, learnt tasks, their conditions or their transitions, or
            agree in label and seed.
    """
    first = runs[0]
    for run in runs[1:]:
        _check_pair(first, run)
        _refuse_difference(first, run, "tasks", ",".join(first.learnt), ",".join(run.learnt))
        for task, one, other in zip(first.learnt, first.budgets, run.budgets, strict=True):
            _check_budget(first, run, task, one, other)
    seen: dict[tuple[str, int], ContinualRun] = {}
    for run, label in zip(runs, labels, strict=True):
        twin = seen.setdefault((label, run.seed), run)
        if twin is not run:
            raise UserError(f"{twin.folder} and {run.folder} are both {label} with seed {run.seed}; leave one out")


def check_references(runs: Sequence[ContinualRun], references: Sequence[ContinualRun]) -> None:
    """Refuse references that do not say how soon each task of the runs, which are comparable, is learnt alone.

    Raises:
        UserError: a task is missing there, was learnt under other conditions, or has no success.
    """
    first = runs[0]
    known: dict[str, tuple[ContinualRun, int]] = {}
    for reference in references:
        _check_pair(first, reference)
        for task, budget in zip(reference.learnt, reference.budgets, strict=True):
            known[original_name(task)] = reference, budget
    if measures(first.document)["measure"] != "success":
        raise UserError(f"{first.folder} has no success, which forward transfer is made of; leave out reference=")
    for task, budget in zip(first.learnt, first.budgets, strict=True):
        name = original_name(task)
        if name not in known:
            raise UserError(f"the reference lacks {name}, a task of {first.folder}; give runs with all its tasks")
        _check_budget(first, known[name][0], name, budget, known[name][1])


def _run_folders(folder: Path) -> list[Path]:
    if folder.name == SWEEP_FILE:  # named by runs/<sweep>/*
        return []
    if (folder / SUMMARY_FILE).is_file():
        return [folder]
    inside = sorted(path.parent for path in folder.glob(f"*/{SUMMARY_FILE}"))
    if not inside:
        raise UserError(
            f"{folder} holds no finished continual run: there is no {SUMMARY_FILE}; give folders of runs, or one "
            "that holds them"
        )
    return inside


def _read(run_dir: Path) -> ContinualRun:
    path = run_dir / SUMMARY_FILE
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{run_dir} is no continual run but one of another kind; give folders of continual runs")
    run = ContinualRun(run_dir, document, _options(run_dir / CONFIG_FILE))
    with reading(path, "it is damaged; leave this run out"):
        _check_document(run)
    return run


def _options(path: Path) -> dict[str, str]:
    """Return options of ``OPTION_GROUPS``; none where the folder has no configuration."""
    if not path.is_file():
        return {}
    groups = OmegaConf.to_container(read_yaml(path))
    chosen = {name: groups[name] for name in OPTION_GROUPS if name in groups} if isinstance(groups, dict) else {}
    return dict(_flat(chosen))


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _check_document(run: ContinualRun) -> None:
    """Raise KeyError, TypeError, ValueError or IndexError for what a report would stumble over."""
    document = run.document
    measures(document)
    shape = (len(run.learnt) + 1, len(document["tasks"]))
    for name in ("success", "return"):
        if document[name] is not None and np.shape(document[name]) != shape:
            raise ValueError(f"{name} of the shape {list(np.shape(document[name]))} for {shape[1]} tasks")
    if len(run.budgets) != len(run.learnt):
        raise ValueError(f"per_task has {len(run.budgets)} entries for {len(run.learnt)} learnt tasks")
    numbers = [document["seconds"], run.seed]
    for entry in document["per_task"]:
        numbers.append(entry["trained_parameters"])
        numbers += [entry["stored_bytes"][name] for name in ("shared", "tasks", "memory")]
    if not all(isinstance(number, int | float) for number in numbers):
        raise TypeError("seconds, parameters or bytes that are no numbers")
    if not all(isinstance(document[name], str) for name in ("method", "algorithm", "suite", "measure", "task_ids")):
        raise TypeError("method, algorithm, suite, measure or task_ids that is no text")
    for name in ("critic", "optimizer", "replay"):
        _ = document["carried"][name]


def _check_pair(first: ContinualRun, run: ContinualRun) -> None:
    """Refuse another suite, algorithm, measure or conditions of the tasks."""
    for name in ("suite", "algorithm", "measure"):
        _refuse_difference(first, run, name, first.document[name], run.document[name])
    one, other = first.document["conditions"], run.document["conditions"]
    for name in TASK_CONDITIONS:
        _refuse_difference(first, run, name, one.get(name), other.get(name))


def _check_budget(first: ContinualRun, run: ContinualRun, task: str, one: int, other: int) -> None:
    """Refuse another budget; a task on which a method trains nothing may stand beside any."""
    if one and other and abs(one - other) > BUDGET_TOLERANCE * max(one, other):
        _refuse_difference(first, run, f"transitions of {task}", one, other)


def _refuse_difference(first: ContinualRun, run: ContinualRun, what: str, one: object, other: object) -> None:
    if one != other:
        raise UserError(f"{first.folder} and {run.folder} differ in {what}: {one} and {other}; report them apart")
