"""Names of the files in a run folder, and the run folders among others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

#: Written when a run can be gone on with: what makes a folder that of a run.
CONFIG_FILE = "config.yaml"
SUMMARY_FILE, METRICS_FILE, LOCK_FILE = "summary.json", "metrics.jsonl", ".lock"
PRUNING_FILE = "pruning.json"  # of a pruned copy
CHECKPOINTS = "checkpoints"
DEPTH = 4  # of folders in folders, such as sweeps


def is_run(folder: Path) -> bool:
    """Return True for a folder that a run has begun in."""
    traces = (METRICS_FILE, SUMMARY_FILE, CHECKPOINTS)
    return (folder / CONFIG_FILE).is_file() and any((folder / name).exists() for name in traces)


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the run folders in ``folder`` or in folders of it, in the order of their names; itself if it is one."""
    yield from _find(folder, DEPTH)


def _find(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth and folder.is_dir() and not folder.is_symlink():
        for inside in sorted(folder.iterdir()):
            if inside.is_dir() and not inside.name.startswith("."):
                yield from _find(inside, depth - 1)
