"""What run folders say of their runs, read without torch: configuration, results, and whether they go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from varshare_rl.errors import UserError
from varshare_rl.reading import read_bytes, read_object, read_yaml
from varshare_rl.run_files import CONFIG_FILE, LOCK_FILE, METRICS_FILE, PRUNING_FILE, SUMMARY_FILE


@dataclass(frozen=True)
class FoundRun:
    """A run folder.

    Attributes:
        state: ``done``, ``running`` (a process holds its folder), ``stopped``, or ``pruned`` (a copy of one).
        kind: suite, algorithm and network; of a sequence its method in place of the latter.
        success: mean over tasks, in the latest evaluation; None before one, or in a suite without success.
        mean_return: the same of the return.
        transitions, total_transitions: done, and to be done; seconds: of training so far.
        tasks: success, return and others by task, once it is done.
    """

    folder: Path
    state: str
    kind: str
    seed: int | None
    success: float | None
    mean_return: float | None
    transitions: int
    total_transitions: int | None
    seconds: float
    tasks: Mapping[str, Mapping[str, float | None]]


def is_held(folder: Path) -> bool:
    """Return True if a process holds the run folder."""
    path = folder / LOCK_FILE
    if not path.exists():
        return False
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:  # a folder of others
        return False
    lock.release()
    return False


def read_run(folder: Path) -> FoundRun:
    """Read what a run folder says; what is missing or damaged is left out."""
    config, summary = _config(folder), _json(folder / SUMMARY_FILE)
    last = _last_values(folder / METRICS_FILE)
    pruned = _json(folder / PRUNING_FILE)
    found = summary or pruned or last
    names = [_name(config, group) for group in ("env", "algorithm", "method" if "method" in config else "network")]
    tasks = summary.get("tasks", {})
    return FoundRun(
        folder=folder,
        state="running" if is_held(folder) else "done" if summary else "pruned" if pruned else "stopped",
        kind=" ".join(name for name in names if name),
        seed=config.get("seed"),
        success=_of_all(found, "success"),
        mean_return=_of_all(found, "return"),
        transitions=int(found.get("transitions", 0)),
        total_transitions=config.get("total_transitions"),
        seconds=float(found.get("seconds", 0.0)),
        tasks=tasks if isinstance(tasks, dict) else _last_of_sequence(summary),
    )


def _of_all(found: Mapping[str, Any], name: str) -> float | None:
    """Return a mean over tasks of a summary, of a sequence's, or of a line of metrics."""
    for key in (f"mean_{name}", f"eval/mean_{name}"):
        if key in found:
            value: float | None = found[key]
            return value
    if found.get("format") == "continual":
        values = [value for value in found[name][-1] if value is not None]
        return sum(values) / len(values) if values else None
    return found.get("continual/mean_of_learnt") if name == "success" else None


def _last_of_sequence(summary: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    rows = zip(summary["tasks"], summary["success"][-1], summary["return"][-1], strict=True)
    return {task: {"success": success, "return": earned} for task, success, earned in rows}


def _last_values(path: Path) -> dict[str, Any]:
    """Return the last value of every metric of the form ``eval/mean_*`` or ``continual/*``, and the last counts."""
    values: dict[str, Any] = {}
    try:
        lines = read_bytes(path).decode("utf-8", errors="replace").splitlines()
    except UserError:
        return values
    wanted = ("transitions", "seconds", "eval/mean_", "continual/mean")
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # being written
            continue
        if isinstance(entry, dict):
            values |= {name: value for name, value in entry.items() if name.startswith(wanted)}
    return values


def _config(folder: Path) -> dict[str, Any]:
    try:
        found: Any = OmegaConf.to_container(read_yaml(folder / CONFIG_FILE))
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(config: Mapping[str, Any], group: str) -> str:
    options = config.get(group)
    if not isinstance(options, dict):
        return ""
    return str(options.get("benchmark") or options.get("name") or "")


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except UserError:
        return {}
