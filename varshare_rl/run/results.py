"""The result of a run: its numbers and their provenance."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import varshare_rl
from varshare_rl.processor import processor
from varshare_rl.reporting.statistics import WORST, iqm

PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "metaworld")
PROJECT = Path(varshare_rl.__file__).resolve().parent.parent
SOURCES = ("varshare_rl", "envs", "configs")  # what a result depends on


def provenance(
    suite_provenance: Mapping[str, Any], seed: int, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Return what a result must say of how it came about; the suite's own entries are added to it.

    ``git_commit`` and ``git_dirty`` are those of the project's folder, None where it is not a clone.
    """
    device = torch.device(device)
    versions = {"python": platform.python_version(), "varshare_rl": varshare_rl.__version__}
    versions |= {name: version for name in PACKAGES if (version := _version(name)) is not None}
    commit, dirty = _git(PROJECT)
    return {
        **versions,
        "seed": seed,
        "device": str(device),
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "git_commit": commit,
        "git_dirty": dirty,
        **suite_provenance,
    }


def summary(
    *,
    tasks: Mapping[str, Mapping[str, float | None]],
    transitions: int,
    updates: int,
    seconds: float,
    parameters: Mapping[str, int],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of ``summary.json`` and of the files of ``evaluate``.

    ``tasks[name]`` holds ``return`` (mean over episodes), ``success`` (at any step of an episode),
    ``success_final`` (at its last step), ``episode_steps`` and ``kl`` (nats). The successes are None in a suite
    that has none, ``kl`` where the network has no posterior. ``transitions`` (all tasks together), ``updates``
    (gradient steps) and ``seconds`` are those of the training. ``parameters`` counts ``stored, active_per_task,
    shared, per_task``. Raises KeyError if one of these is missing.
    """
    return {
        **scores(tasks, "kl"),
        "transitions": transitions,
        "updates": updates,
        "seconds": round(seconds, 3),
        "transitions_per_second": round(transitions / seconds, 3) if seconds > 0 else None,
        "parameters": {name: parameters[name] for name in ("stored", "active_per_task", "shared", "per_task")},
        "conditions": dict(provenance),
    }


def scores(tasks: Mapping[str, Mapping[str, float | None]], *further: str) -> dict[str, Any]:
    """Return means over tasks, their interquartile means and those of the worst few, and every task's own numbers.

    These are success, return, steps, and what ``further`` names. Raises KeyError if one of them is missing.
    """
    names = ("success", "success_final", "return", "episode_steps")
    columns = {name: [row[name] for row in tasks.values()] for name in names}
    return {
        **{f"mean_{name}": _mean(values) for name, values in columns.items()},
        **{f"iqm_{name}": interquartile_mean(columns[name]) for name in ("success", "return")},
        **{f"worst_{name}": worst(columns[name]) for name in ("success", "return")},
        "tasks": {task: {name: row[name] for name in (*names, *further)} for task, row in tasks.items()},
    }


def interquartile_mean(values: Sequence[float | None]) -> float | None:
    """Return the interquartile mean of the values that there are; None without any."""
    known = [value for value in values if value is not None]
    return float(iqm(np.array([known]))) if known else None


def worst(values: Sequence[float | None], counts: Sequence[int] = WORST) -> dict[str, float | None]:
    """Return the means of the ``k`` lowest values, by ``k``, as far as there are so many."""
    known = sorted(value for value in values if value is not None)
    return {str(k): _mean(known[:k]) for k in counts if k <= len(known)}


def evaluation_file(
    checkpoint: str, protocol: str | None = None, actions: str | None = None, draw: str | None = None
) -> str:
    """Return the name of the file that ``evaluate`` writes: of its own for every kind of evaluation.

    ``evaluation.json`` is that of the last checkpoint without a protocol, ``evaluation_best_official.json`` of the
    best one with Meta-World's.

    Args:
        checkpoint: ``last`` or ``best``.
        protocol: its name; actions: ``stochastic`` where they were drawn; draw: how the policy's weights were
            drawn, where that was chosen.
    """
    parts = [checkpoint if checkpoint != "last" else None, protocol, actions, draw]
    return "_".join(["evaluation", *(part for part in parts if part is not None)]) + ".json"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor("model name") or platform.processor() or platform.machine()


def _git(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit of a clone and whether its sources differ from it; (None, None) for no clone."""
    # Only a tracked package counts: an installed one may lie inside the repository of something else.
    if _git_output(folder, "ls-files", "--error-unmatch", "varshare_rl/__init__.py") is None:
        return None, None
    commit = _git_output(folder, "rev-parse", "--verify", "HEAD")
    status = _git_output(folder, "status", "--porcelain", "--", *SOURCES)
    return commit, None if commit is None or status is None else bool(status)


def _git_output(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
