"""What experiments over many runs have in common: reading and naming the runs, and a table of them."""

from __future__ import annotations

import csv
import functools
import json
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, cast

from varshare_rl.cli import compose
from varshare_rl.config import TrainConfig, fixed_options

#: One line of a table: what its columns hold.
Row = dict[str, object]


def finished_runs(folders: Iterable[Path]) -> list[Path]:
    """The run folders right inside ``folders`` that have a ``summary.json``, sorted."""
    return sorted(path.parent for folder in folders for path in folder.glob("*/summary.json"))


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@functools.cache
def options_of(*words: str) -> Mapping[str, Any]:
    """What a command line of ``train`` is fixed to, by option; composed once."""
    return fixed_options(cast(TrainConfig, compose("train", words)))


def changes(config: TrainConfig, words: Sequence[str], indifferent: Container[str]) -> list[str]:
    """Return the options that a command line of these words has, too, but otherwise, as words."""
    base = options_of(*words)
    differing = {name: value for name, value in fixed_options(config).items() if base.get(name, value) != value}
    return [f"{name}={value}" for name, value in differing.items() if name not in indifferent]


def without_common(members: Sequence[Sequence[str]], nothing: str) -> list[str]:
    """Return each member's words without those that all have, as one text; ``nothing`` for none."""
    common = set.intersection(*map(set, members)) if len(members) > 1 else set()
    return [" ".join(word for word in words if word not in common) or nothing for words in members]


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
