"""What experiments over many runs have in common: finding the runs, and a table of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def finished_runs(folders: Iterable[Path]) -> list[Path]:
    """The run folders right inside ``folders`` that have a ``summary.json``, sorted."""
    return sorted(path.parent for folder in folders for path in folder.glob("*/summary.json"))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """A line with the columns' names and one per row, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
