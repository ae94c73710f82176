"""What experiments over many runs have in common: finding the runs, and a table of them."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

#: One line of a table: what its columns hold.
Row = dict[str, object]


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


def number(row: Row, column: str) -> float:
    """A column as a number."""
    return float(str(row[column]))


def average(rows: Iterable[Row], column: str) -> float:
    """Mean of a column."""
    return mean(number(row, column) for row in rows)


def grouped(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows that agree in ``columns``, by what they hold there, in the order in which they are met."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(str(row[column]) for column in columns)].append(row)
    return groups


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rule = ["---"] * len(columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines))
