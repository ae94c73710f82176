"""The screen of a run while it goes on: one progress line, and a table per evaluation.

On a terminal the progress line is live. Anywhere else (a file, a pipe, a job log) it is a plain line after a few
seconds and then every half minute, and nothing printed holds control characters.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from textwrap import fill
from types import TracebackType
from typing import Any, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

FIRST_LINE_SECONDS, PLAIN_INTERVAL_SECONDS = 5.0, 30.0
PLAIN_WIDTH = 100
RATE_WINDOW_SECONDS = 30.0
REFRESH_SECONDS = 0.25
#: Rows that a table has at most, unless all are wanted, and those that are then left of it.
MANY_TASKS, WORST_TASKS = 12, 10
#: Columns that a table is short of where it would be too wide, the first ones first.
DISPENSABLE = ("steps", "nats", "final")

UNBROKEN: Any = {"break_long_words": False, "break_on_hyphens": False}

#: Numbers of a table, by row and column.
Rows = Mapping[str, Mapping[str, float | None]]


class Console:
    """The screen of one run. Use it as a context manager, so that the terminal is left as it was found."""

    def __init__(
        self, total_transitions: int, quiet: bool = False, stream: TextIO | None = None, all_tasks: bool = False
    ) -> None:
        """Show progress towards ``total_transitions`` (all tasks together) on ``stream`` (default: stdout).

        With ``quiet`` only :meth:`message` prints; with ``all_tasks`` tables have a row for every task.
        """
        self._total = total_transitions
        self._quiet, self._all_tasks = quiet, all_tasks
        self._rich = RichConsole(file=stream)
        # FORCE_COLOR, which rich takes for a terminal, moves no cursor in a file.
        self._live = self._rich.file.isatty() and not self._rich.is_dumb_terminal
        if not self._live:
            self._rich = RichConsole(file=stream, width=PLAIN_WIDTH, force_terminal=False)
        self._began: tuple[float, int] | None = None  # time and transitions of the first call
        self._marks: deque[tuple[float, int]] = deque()  # those after updates
        self._now = (0.0, 0)
        self._headline = ""
        self._next_line = 0.0
        self._next_refresh = 0.0
        self._progress = Progress(
            BarColumn(bar_width=max(4, min(40, self._rich.width - 64))),  # 16 beside the counts in 80 columns
            TextColumn("{task.description}", markup=False),
            console=self._rich,
            refresh_per_second=4,
            disable=quiet or not self._live,
        )
        self._task = self._progress.add_task("", total=max(total_transitions, 1))

    def __enter__(self) -> Console:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._show()
        self._progress.stop()

    @property
    def transitions_per_second(self) -> float:
        """The rate over the last half minute; 0 before two counts are known.

        It is measured from update to update, so that neither a phase before the first one nor half a round of
        acting and updating counts.
        """
        if self._began is None:
            return 0.0
        (start, first), (end, last) = self._began, self._now
        if self._marks:
            end, last = self._marks[-1]
            if end - self._marks[0][0] >= 1.0:
                start, first = self._marks[0]
        return (last - first) / (end - start) if end > start else 0.0

    def progress(self, transitions: int, headline: Mapping[str, float] | None = None, updated: bool = True) -> None:
        """Show how far the run is, with a few scalars such as the mean success; may be called at every step.

        The first call sets the point that the rate is measured from: make it before the first step. ``updated``:
        the networks were updated since the last call; there is no time left to tell before they are.
        """
        now = time.monotonic()
        self._now = (now, transitions)
        if self._began is None:
            self._began, self._next_line = self._now, now + FIRST_LINE_SECONDS
        elif updated:
            self._marks.append(self._now)
            # the oldest mark is the last one outside the window, so that the window is always covered
            while len(self._marks) > 2 and self._marks[1][0] < now - RATE_WINDOW_SECONDS:
                self._marks.popleft()
        if headline is not None:
            self._headline = " | ".join(
                f"{name} {value:{_format_for([value])}}" for name, value in headline.items()
            )
        if self._quiet:
            return
        if self._live:
            if headline is not None or now >= self._next_refresh:
                self._next_refresh = now + REFRESH_SECONDS
                self._show()
        elif now >= self._next_line:
            rounds = (now - self._began[0]) // PLAIN_INTERVAL_SECONDS
            self._next_line = self._began[0] + (rounds + 1) * PLAIN_INTERVAL_SECONDS
            line = " | ".join(part for part in (self._counts(), self._headline) if part)
            self._rich.print(Text(line), soft_wrap=True)

    def table(self, title: str, rows: Rows) -> None:
        """Print a table of ``rows[task][column]`` with a mean row, None as a dash.

        Of many tasks it has the worst ones, by the first column, and the others together, unless all are wanted.
        """
        if self._quiet:
            return
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        shown, others = dict(rows), []
        if len(rows) > MANY_TASKS and not self._all_tasks:
            names = sorted(rows, key=lambda name: _ascending(rows[name].get(columns[0])))
            shown = {name: rows[name] for name in names[:WORST_TASKS]}
            others = names[WORST_TASKS:]
            title = f"{title}, the {WORST_TASKS} worst of {len(rows)} tasks"
        below: dict[str, list[str]] = {f"{len(others)} others": others} if others else {}
        if len(rows) > 1:
            below["mean"] = list(rows)
        formats = {column: _format_for(_known(rows, rows, column)) for column in columns}
        cells = {name: {c: _cell(row.get(c), formats[c]) for c in columns} for name, row in shown.items()}
        for name, of in below.items():
            cells[name] = {c: _cell(_mean(_known(rows, of, c)), formats[c]) for c in columns}
        self._print_table(title, columns, cells, sections=len(below))

    def _print_table(
        self, title: str, columns: Sequence[str], cells: Mapping[str, Mapping[str, str]], sections: int
    ) -> None:
        """Print cells by row and column without breaking a name; the last rows are set apart."""
        columns = list(columns)
        for name in DISPENSABLE:
            if name in columns and _width(columns, cells) > self._rich.width:
                columns.remove(name)
        self._rich.print(Text(title), soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD, width=_width(columns, cells))
        table.add_column("task", no_wrap=True)
        for column in columns:
            table.add_column(Text(column), justify="right", no_wrap=True)
        for number, (name, row) in enumerate(cells.items()):
            if sections and number == len(cells) - sections:
                table.add_section()
            table.add_row(Text(name), *(Text(row[column]) for column in columns))
        self._rich.print(table, crop=False)

    def describe(self, title: str, entries: Mapping[str, str]) -> None:
        """Print a titled list of names and values: what a run is about to do."""
        if self._quiet:
            return
        width = max((len(name) for name in entries), default=0)
        longest = max((cell_len(word) for value in entries.values() for word in value.split()), default=0)
        if self._live and width + longest + 6 <= self._rich.width:  # no word need be broken
            grid = Table.grid(padding=(0, 2))
            for name, value in entries.items():
                grid.add_row(Text(name, style="bold"), Text(value))
            self._rich.print(Panel(grid, title=Text(title), title_align="left", expand=False))
            return
        self._rich.print(Text(title), soft_wrap=True)
        for name, value in entries.items():
            line = f"  {name:<{width}}  {value}"
            if self._live:
                indent = " " * (width + 4)
                line = fill(line, self._rich.width, subsequent_indent=indent, **UNBROKEN)
            self._rich.print(Text(line), soft_wrap=True)

    def message(self, text: str) -> None:
        """Print a line, also when quiet. It is never wrapped, so that commands in it can be copied."""
        self._rich.print(Text(text), soft_wrap=True)

    def _show(self) -> None:
        """Bring the live line up to date."""
        if self._live and self._began is not None:
            description = f"{self._counts()}\n{self._headline}"
            self._progress.update(self._task, completed=self._now[1], description=description)

    def _counts(self) -> str:
        transitions, rate = self._now[1], self.transitions_per_second
        left = _duration((self._total - transitions) / rate) if rate > 0 and self._marks else "?"
        if self._live and self._rich.width < 80:
            return f"{_short(transitions)} / {_short(self._total)} | {rate:,.0f}/s | {left} left"
        return f"{transitions:,} / {self._total:,} transitions | {rate:,.0f}/s | {left} left"


def counted(number: int, noun: str) -> str:
    """Return ``1 episode`` or ``1,000 episodes``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _known(rows: Rows, names: Sequence[str] | Rows, column: str) -> list[float]:
    return [value for name in names if (value := rows[name].get(column)) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _ascending(value: float | None) -> tuple[bool, float]:
    """Order numbers from the worst: none and NaN first."""
    return (value is not None and value == value, value or 0.0)


def _width(columns: Sequence[str], cells: Mapping[str, Mapping[str, str]]) -> int:
    """Return the width of a table: a space at both sides of every column, and one between them and at the edges."""
    widths = [max(map(cell_len, ["task", *cells]))]
    widths += [max(cell_len(column), *(cell_len(row[column]) for row in cells.values())) for column in columns]
    return sum(width + 3 for width in widths) + 1


def _format_for(values: Sequence[float]) -> str:
    """Choose the decimals of a column by its largest value, so that its numbers line up."""
    largest = max((abs(value) for value in values if abs(value) < float("inf")), default=0.0)
    return ".2f" if largest < 10 else ".1f" if largest < 1000 else ",.0f"


def _cell(value: float | None, style: str) -> str:
    return "-" if value is None else f"{value:{style}}"


def _short(count: int) -> str:
    """Write 20,000,000 as 20M and 1,234,567 as 1.23M."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.2f}".rstrip("0").rstrip(".") + name
    return str(count)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minute:02d}:{second:02d}"
