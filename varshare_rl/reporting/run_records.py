"""What training runs left in their folders, as plain values: finding the folders, and reading them."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from varshare_rl.errors import UserError
from varshare_rl.reading import read_bytes, read_object, reading
from varshare_rl.run_files import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, find_runs

Values = npt.NDArray[np.float64]
Options = Mapping[str, bool | int | float | str]

EVALUATION_FILE = "evaluation.json"
#: Measures of an evaluation.
MEASURES = ("success", "success_final", "return")


@dataclass(frozen=True)
class Curves:
    """Evaluations of a run, at ``transitions [K]`` and ``seconds [K]``: ``values`` by measure ``[K, T]``."""

    transitions: Values
    seconds: Values
    values: Mapping[str, Values]

    def until(self, transitions: float) -> Curves:
        """Return the evaluations by then."""
        kept = self.transitions <= transitions
        values = {name: found[kept] for name, found in self.values.items()}
        return Curves(self.transitions[kept], self.seconds[kept], values)


@dataclass(frozen=True)
class RunRecord:
    """A run: its options by dotted name, tasks, evaluations, and what its summary has.

    ``scores`` are the final ones by measure, ``[T]``, NaN where there is none; None for a run without an end, which
    has no ``conditions`` and ``parameters`` either. ``nats [T]`` and ``sharing`` are None without a posterior.
    """

    folder: Path
    options: Options
    tasks: tuple[str, ...]
    curves: Curves
    scores: Mapping[str, Values] | None
    conditions: Mapping[str, Any]
    parameters: Mapping[str, int] | None
    transitions: int
    seconds: float
    nats: Values | None
    sharing: float | None

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.options["seed"])


def runs_named(given: Iterable[str]) -> list[Path]:
    """Return the run folders among ``given`` folders and patterns, and all below those that are none, each once.

    Raises:
        UserError: there is nothing of that name, or no run in it.
    """
    found: dict[Path, Path] = {}
    for pattern in given:
        named = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
        if not named:
            raise UserError(f"nothing is called {pattern}; give run folders, patterns of them, or sweep folders")
        folders = [folder for name in named if Path(name).is_dir() for folder in find_runs(Path(name))]
        if not folders:
            raise UserError(f"there is no run in {pattern}: no folder with a {CONFIG_FILE}; give others")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def read_record(folder: Path, options: Options, evaluation: bool = False) -> RunRecord:
    """Read a run, whose ``options`` are known; its scores from ``evaluation.json`` if that is asked for.

    Raises:
        UserError: it has no evaluation, or a file in it is damaged.
    """
    summarized = folder / (EVALUATION_FILE if evaluation else SUMMARY_FILE)
    if evaluation and not summarized.exists():
        raise UserError(f"{folder} has no {EVALUATION_FILE}; evaluate run={folder} writes it")
    with reading(summarized, "it is damaged"):
        summary = read_object(summarized) if summarized.exists() else None
        tasks = None if summary is None else tuple(summary["tasks"])
    with reading(folder / METRICS_FILE, "it is damaged"):
        curves, tasks, last = _read_metrics(folder / METRICS_FILE, tasks)
    with reading(summarized, "it is damaged"):
        return _record(folder, options, summary, tasks, curves, last)


def _record(
    folder: Path, options: Options, summary: Any, tasks: tuple[str, ...], curves: Curves, last: Mapping[str, Any]
) -> RunRecord:
    if summary is None and not len(curves.transitions):
        raise UserError(f"{folder} has no evaluation yet")
    nats = _row(last.get(f"kl/{task}") for task in tasks)
    scores = None
    if summary is not None:
        scores = {name: _row(summary["tasks"][task].get(name) for task in tasks) for name in MEASURES}
        nats = _row(summary["tasks"][task].get("kl") for task in tasks)
    return RunRecord(
        folder=folder,
        options=options,
        tasks=tasks,
        curves=curves,
        scores=scores,
        conditions={} if summary is None else dict(summary["conditions"]),
        parameters=None if summary is None else {name: int(n) for name, n in summary["parameters"].items()},
        transitions=int(last["transitions"] if summary is None else summary["transitions"]),
        seconds=float(last["seconds"] if summary is None else summary["seconds"]),
        nats=None if np.isnan(nats).any() else nats,
        sharing=_last_sharing(folder),
    )


def _read_metrics(path: Path, tasks: tuple[str, ...] | None) -> tuple[Curves, tuple[str, ...], dict[str, Any]]:
    """Return the evaluations, the tasks, and the last value of everything that was logged."""
    lines = read_bytes(path).decode().splitlines() if path.exists() else []
    evaluations: dict[int, dict[str, Any]] = {}
    last: dict[str, Any] = {"transitions": 0, "seconds": 0.0}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):  # the process died while it wrote this line, or is writing it
                break
            raise
        last |= entry
        if any(name.startswith("eval/") for name in entry):
            evaluations[int(entry["transitions"])] = entry
    if tasks is None:
        ends = "/return"
        names = next(iter(evaluations.values()), {})
        tasks = tuple(
            name.removeprefix("eval/").removesuffix(ends)
            for name in names
            if name.startswith("eval/") and name.endswith(ends)
        )
    rows = list(evaluations.values())
    values = {
        name: np.array([_row(row.get(f"eval/{task}/{name}") for task in tasks) for row in rows])
        for name in MEASURES
    }
    transitions, seconds = (_row(row[name] for row in rows) for name in ("transitions", "seconds"))
    return Curves(transitions, seconds, values), tasks, last


def _last_sharing(folder: Path) -> float | None:
    """Return the sharing of all layers at the last observation."""
    for path in sorted((folder / "sharing").glob("*.json"), reverse=True):
        found = read_object(path).get("sharing")
        return None if found is None else float(found)
    return None


def _row(values: Iterable[Any]) -> Values:
    return np.array(list(values), dtype=np.float64)  # None becomes NaN
