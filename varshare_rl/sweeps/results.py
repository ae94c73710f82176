"""The results of a sweep by what was swept, seeds pooled: a table on the screen and ``sweep.csv``."""

from __future__ import annotations

import csv
import io
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from varshare_rl.errors import UserError
from varshare_rl.reading import read_object
from varshare_rl.reporting.statistics import FEW_RUNS, Interval, Scores, iqm_interval
from varshare_rl.run.console import PLAIN_WIDTH
from varshare_rl.run_files import SUMMARY_FILE
from varshare_rl.sweeps.plan import Job

SEED = "seed"
#: Interval of no run.
NOTHING = Interval(math.nan, None, None, 0)
#: Values of the options that are swept.
Choices = tuple[tuple[str, str], ...]


@dataclass
class Row:
    """The runs with the same values: a score, the ends of its interval or None, and means over the runs."""

    choices: dict[str, str]
    seeds: int
    score: Interval
    mean_return: float
    transitions: float
    seconds: float


@dataclass
class Results:
    """Rows in the sweep's order.

    Attributes:
        measure: ``success`` or ``return``, what the scores are of.
        statistic: what a score and its interval are.
        remark: what is wrong with them, and what to do about it, if anything.
    """

    rows: list[Row]
    measure: str
    statistic: str
    remark: str


def scores_by_choice(jobs: Sequence[Job]) -> tuple[str, dict[Choices, Scores]]:
    """Return the measure, and ``[S, T]`` of the runs with the same values but for their seeds."""
    groups = documents_by_choice(jobs)
    documents = [document for group in groups.values() for document in group]
    measure = "success" if all(None not in task_scores(document, "success") for document in documents) else "return"
    return measure, {
        others: np.array([task_scores(document, measure) for document in group], dtype=np.float64)
        for others, group in groups.items()
    }


def documents_by_choice(jobs: Sequence[Job]) -> dict[Choices, list[dict[str, Any]]]:
    """Return what the runs have written at their ends, those with the same values but for their seeds together."""
    groups: dict[Choices, list[dict[str, Any]]] = {}
    for job in jobs:
        path = job.folder / SUMMARY_FILE
        if path.is_file():
            others = tuple((key, value) for key, value in job.choices.items() if key != SEED)
            groups.setdefault(others, []).append(read_object(path))
    return groups


def pool(jobs: Sequence[Job]) -> Results:
    """Pool the runs that are done over their seeds."""
    groups = documents_by_choice(jobs)
    measure, found = scores_by_choice(jobs)
    scores = {others: array[np.isfinite(array).all(axis=1)] for others, array in found.items()}
    lost = sum(len(array) for array in found.values()) - sum(len(array) for array in scores.values())
    statistic, remark = "interquartile mean over seeds and tasks, 95 % interval", ""
    try:
        intervals = {others: iqm_interval(array) if len(array) else NOTHING for others, array in scores.items()}
        if any(1 < interval.runs <= FEW_RUNS for interval in intervals.values()):
            remark = f"intervals of {FEW_RUNS} seeds or fewer are too narrow"
    except UserError as error:
        statistic, remark = "mean over seeds and tasks, least and greatest seed", str(error)
        intervals = {others: spread(array) if len(array) else NOTHING for others, array in scores.items()}
    if lost:
        said = f"{lost} run{'s' * (lost > 1)} with a {measure} that is no number: left out"
        remark = "; ".join(part for part in (said, remark) if part)
    rows = [
        Row(
            dict(others), len(group), intervals[others],
            float(np.mean(np.array([task_scores(document, "return") for document in group], dtype=np.float64))),
            float(np.mean([document["transitions"] for document in group])),
            float(np.mean([document["seconds"] for document in group])),
        )
        for others, group in groups.items()
    ]  # fmt: skip
    return Results(rows, measure, statistic, remark)


def task_scores(document: dict[str, Any], measure: str) -> list[float | None]:
    """Return the score of every task at the end of a run, or of a sequence of tasks."""
    if document.get("format") == "continual":
        return list(document[measure][-1])
    return [row[measure] for row in document["tasks"].values()]


def spread(scores: Scores) -> Interval:
    """Return the mean of ``scores [S, T]``, and the least and the greatest mean of a run."""
    runs = scores.mean(axis=1)
    if len(runs) < 2:
        return Interval(float(runs.mean()), None, None, len(runs))
    return Interval(float(runs.mean()), float(runs.min()), float(runs.max()), len(runs))


def show(results: Results) -> None:
    """Print the table and the best row, as options that can be given again."""
    width, live = (None, True) if sys.stdout.isatty() else (PLAIN_WIDTH, False)
    options = list(results.rows[0].choices)
    last = [re.split("[./]", name)[-1] for name in options]
    headings = [part if last.count(part) == 1 else name for part, name in zip(last, options, strict=True)]
    grid = Table(box=box.SIMPLE_HEAD)
    for heading in headings:
        grid.add_column(Text(heading), overflow="fold")
    for heading in ("seeds", results.measure, "interval", "mean return", "seconds"):
        grid.add_column(Text(heading), justify="right", no_wrap=True)
    best = max(results.rows, key=lambda row: (row.score.point, row.mean_return))
    for row in results.rows:
        low, high = row.score.low, row.score.high
        ends = "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        numbers = (f"{row.score.point:.3f}", ends, f"{row.mean_return:,.3f}", f"{row.seconds:,.0f}")
        cells = [*row.choices.values(), str(row.seeds), *numbers]
        grid.add_row(*map(Text, cells), style="bold" if row is best and len(results.rows) > 1 else "")
    console = Console(highlight=False, width=width, force_terminal=live)
    console.print(Text(f"{results.measure}: {results.statistic}"), soft_wrap=True)
    console.print(grid)
    if len(results.rows) > 1:
        chosen = shlex.join(f"{key}={value}" for key, value in best.choices.items())
        console.print(Text(f"best: {chosen}"), soft_wrap=True)
    if results.remark:
        console.print(Text(results.remark), soft_wrap=True)


def to_csv(results: Results) -> str:
    """Return the table as CSV; the ends of an interval are empty where there is one seed."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    measure, options = results.measure, list(results.rows[0].choices)
    score = (measure, f"{measure}_low", f"{measure}_high", "statistic")
    writer.writerow([*options, "seeds", *score, "mean_return", "transitions", "seconds"])
    for row in results.rows:
        low, high = ("" if end is None else end for end in (row.score.low, row.score.high))
        found = (row.score.point, low, high, results.statistic)
        means = (row.mean_return, row.transitions, round(row.seconds, 3))
        writer.writerow([*(row.choices[name] for name in options), row.seeds, *found, *means])
    return file.getvalue()
