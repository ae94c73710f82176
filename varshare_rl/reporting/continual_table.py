"""Table of continual-learning methods side by side: means over seeds with their intervals, for screen and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from varshare_rl.reporting.continual_measures import Document, mean_or_none
from varshare_rl.reporting.statistics import mean_interval

Row = dict[str, Any]
Number = float | None


class Column(NamedTuple):
    """A column: its heading on screen, empty where it is in files alone, and its value for a run."""

    heading: str
    value: Callable[[Document, Mapping[str, Any]], Number]


def _trained(document: Document, _: Mapping[str, Any]) -> Number:
    entries = document["per_task"]
    return mean_or_none([entry["trained_parameters"] for entry in entries[1:] or entries])


def _bytes(name: str) -> Callable[[Document, Mapping[str, Any]], Number]:
    return lambda document, _: float(document["per_task"][-1]["stored_bytes"][name])


def _bytes_per_task(document: Document, _: Mapping[str, Any]) -> Number:
    return float(document["per_task"][-1]["stored_bytes"]["tasks"]) / len(document["tasks"])


def _bytes_in_all(document: Document, _: Mapping[str, Any]) -> Number:
    stored = document["per_task"][-1]["stored_bytes"]
    return float(stored["shared"] + stored["tasks"] + stored["memory"])


LEARNT = {
    "performance": Column("P", lambda _, found: found["performance"]),
    "forgetting": Column("F", lambda _, found: found["forgetting"]),
    "forward_transfer": Column("FT", lambda _, found: found["forward_transfer"]),
    "backward_transfer": Column("BWT", lambda _, found: found["backward_transfer"]),
    "old_change": Column("old tasks", lambda _, found: found["old_change"]),
    "zero_shot_transfer": Column("", lambda _, found: found["zero_shot_transfer"]),
    "performance_throughout": Column("", lambda _, found: found["performance_throughout"]),
}
COSTS = {
    "trained_parameters": Column("parameters", _trained),
    "shared_bytes": Column("shared", _bytes("shared")),
    "bytes_per_task": Column("a task", _bytes_per_task),
    "memory_bytes": Column("memory", _bytes("memory")),
    "stored_bytes": Column("in all", _bytes_in_all),
    "seconds": Column("seconds", lambda document, _: float(document["seconds"])),
}


def group_labels(documents: Sequence[Document], config: Sequence[Mapping[str, str]]) -> list[str]:
    """Label each run by its method, and the settings that set it apart from others of that method.

    ``config`` has further settings of each run by name. Old tasks are named wherever runs differ in them, of
    whatever method they are.
    """
    settings = [{**_settings(document), **own} for document, own in zip(documents, config, strict=True)]

    def varies(name: str, method: str) -> bool:
        peers = [
            its.get(name)
            for document, its in zip(documents, settings, strict=True)
            if name == "old_tasks" or document["method"] == method
        ]
        return len(set(peers)) > 1

    return [
        " ".join([method, *(f"{name}={value}" for name, value in own.items() if varies(name, method))])
        for method, own in zip([document["method"] for document in documents], settings, strict=True)
    ]


def compare(labels: Sequence[str], documents: Sequence[Document], found: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Make a row per label, in the order met: ``label, method, seeds``, and per column ``mean, low, high, runs``.

    A mean is over the runs that have the value, with the 95 % interval of
    :func:`~varshare_rl.reporting.statistics.mean_interval`; ``runs`` has the values in the order of the seeds.
    """
    rows = []
    for label in dict.fromkeys(labels):
        of_label = [index for index, other in enumerate(labels) if other == label]
        of_label.sort(key=lambda index: documents[index]["conditions"]["seed"])
        row: Row = {
            "label": label,
            "method": documents[of_label[0]]["method"],
            "seeds": [documents[index]["conditions"]["seed"] for index in of_label],
        }
        for name, column in (LEARNT | COSTS).items():
            row[name] = _estimate([column.value(documents[index], found[index]) for index in of_label])
        rows.append(row)
    return rows


def to_csv(rows: Sequence[Row]) -> str:
    """Write a line per row: label, method, number of runs, and every column as mean, low and high."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    names = [*LEARNT, *COSTS]
    ends = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer.writerow(["label", "method", "runs", *ends])
    for row in rows:
        numbers = [row[name][end] for name in names for end in ("mean", "low", "high")]
        shown = ["" if number is None else f"{number:.10g}" for number in numbers]
        writer.writerow([row["label"], row["method"], len(row["seeds"]), *shown])
    return target.getvalue()


def screen_tables(rows: Sequence[Row], measure: str) -> list[Table]:
    """Make tables of performance and of cost; columns that no row has a value for are left out."""
    learnt = f"{measure}: performance, forgetting, forward and backward transfer, change of old tasks"
    costs = "cost: parameters trained for a later task, bytes stored at the end, seconds"
    return [_screen_table(rows, LEARNT, learnt, _fraction), _screen_table(rows, COSTS, costs, _count)]


def _screen_table(
    rows: Sequence[Row], columns: Mapping[str, Column], title: str, show: Callable[[float], str]
) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("method", overflow="fold")
    table.add_column("runs", justify="right")
    shown = {name: column.heading for name, column in columns.items() if column.heading}
    shown = {name: heading for name, heading in shown.items() if any(row[name]["mean"] is not None for row in rows)}
    for heading in shown.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["label"], str(len(row["seeds"])), *(_cell(row[name], show) for name in shown))
    return table


def _cell(estimate: Mapping[str, Any], show: Callable[[float], str]) -> str:
    """Return the mean, and its interval below it where it is not a point."""
    if estimate["mean"] is None:
        return "-"
    below = "" if estimate["low"] == estimate["high"] else f"\n{show(estimate['low'])}..{show(estimate['high'])}"
    return show(estimate["mean"]) + below


def _estimate(values: Sequence[Number]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    interval = mean_interval(known)
    return {"mean": mean_or_none(known), "low": interval.low, "high": interval.high, "runs": list(values)}


def _settings(document: Document) -> dict[str, str]:
    carried = document["carried"]
    return {
        "old_tasks": str(document["old_tasks"]),
        "task_ids": document["task_ids"],
        "averaged_evaluations": str(document.get("averaged_evaluations", 1)),  # former runs do not say
        **{f"carry.{name}": str(carried[name]).lower() for name in ("critic", "optimizer", "replay")},
    }


def _fraction(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}" if abs(value) < 10 else f"{value:,.1f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"
