"""The screen of a run while it goes on: one progress line, and a table per evaluation.

On a terminal the progress line is live. Anywhere else (a file, a pipe, a job log) it is a plain line every
half minute, and nothing printed holds control characters.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

PLAIN_INTERVAL_SECONDS = 30.0
PLAIN_WIDTH = 100
RATE_WINDOW_SECONDS = 30.0


class Console:
    """The screen of one run. Use it as a context manager, so that the terminal is left as it was found."""

    def __init__(self, total_transitions: int, quiet: bool = False, stream: TextIO | None = None) -> None:
        """Show progress towards ``total_transitions`` (all tasks together) on ``stream`` (default: stdout).

        With ``quiet`` only :meth:`message` prints.
        """
        self._total = total_transitions
        self._quiet = quiet
        self._rich = RichConsole(file=stream)
        # FORCE_COLOR, which rich takes for a terminal, moves no cursor in a file.
        self._live = self._rich.file.isatty() and not self._rich.is_dumb_terminal
        if not self._live:
            self._rich = RichConsole(file=stream, width=PLAIN_WIDTH, force_terminal=False)
        self._marks: deque[tuple[float, int]] = deque()
        self._next_line = time.monotonic() + PLAIN_INTERVAL_SECONDS
        self._progress = Progress(
            BarColumn(bar_width=16),  # with the counts of a long run this fits 80 columns
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
        self._progress.stop()

    @property
    def transitions_per_second(self) -> float:
        """The rate over the last half minute; 0 before two counts are known."""
        if len(self._marks) < 2:
            return 0.0
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / max(end - start, 1e-9)

    def progress(self, transitions: int, headline: Mapping[str, float]) -> None:
        """Show how far the run is, with a few scalars such as the mean success.

        The first call sets the point that the rate is measured from: make it before the first step.
        """
        now = time.monotonic()
        self._marks.append((now, transitions))
        # the oldest mark is the last one outside the window, so that the window is always covered
        while len(self._marks) > 2 and self._marks[1][0] < now - RATE_WINDOW_SECONDS:
            self._marks.popleft()
        if self._quiet:
            return
        counts = self._counts(transitions)
        scalars = " | ".join(f"{name} {value:{_format_for([value])}}" for name, value in headline.items())
        if self._live:
            self._progress.update(self._task, completed=transitions, description=f"{counts}\n{scalars}")
        elif now >= self._next_line:
            self._next_line = now + PLAIN_INTERVAL_SECONDS
            self._rich.print(Text(f"{counts} | {scalars}" if scalars else counts), soft_wrap=True)

    def table(self, title: str, rows: Mapping[str, Mapping[str, float | None]]) -> None:
        """Print a table of ``rows[task][column]`` with a mean row, None as a dash."""
        if self._quiet:
            return
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("task", overflow="fold")
        formats: list[str] = []
        means: list[float | None] = []
        for column in columns:
            values = [value for row in rows.values() if (value := row.get(column)) is not None]
            means.append(sum(values) / len(values) if values else None)
            formats.append(_format_for(values))
            table.add_column(Text(column), justify="right", no_wrap=True)
        for name, row in rows.items():
            cells = [_cell(row.get(column), style) for column, style in zip(columns, formats, strict=True)]
            table.add_row(Text(name), *cells)
        if len(rows) > 1:
            table.add_section()
            table.add_row(Text("mean"), *[_cell(mean, style) for mean, style in zip(means, formats, strict=True)])
        self._rich.print(table)

    def describe(self, title: str, entries: Mapping[str, str]) -> None:
        """Print a titled list of names and values: what a run is about to do."""
        if self._quiet:
            return
        width = max((len(name) for name in entries), default=0)
        if self._live:
            grid = Table.grid(padding=(0, 2))
            for name, value in entries.items():
                grid.add_row(Text(name, style="bold"), Text(value))
            self._rich.print(Panel(grid, title=Text(title), title_align="left", expand=False))
            return
        self._rich.print(Text(title), soft_wrap=True)
        for name, value in entries.items():
            self._rich.print(Text(f"  {name:<{width}}  {value}"), soft_wrap=True)

    def message(self, text: str) -> None:
        """Print a line, also when quiet. It is never wrapped, so that commands in it can be copied."""
        self._rich.print(Text(text), soft_wrap=True)

    def _counts(self, transitions: int) -> str:
        rate = self.transitions_per_second
        left = _duration((self._total - transitions) / rate) if rate > 0 else "?"
        return f"{transitions:,} / {self._total:,} transitions | {rate:,.0f}/s | {left} left"


def _format_for(values: list[float]) -> str:
    """Choose the decimals of a column by its largest value, so that its numbers line up."""
    largest = max((abs(value) for value in values if abs(value) < float("inf")), default=0.0)
    return ".2f" if largest < 10 else ".1f" if largest < 1000 else ",.0f"


def _cell(value: float | None, style: str) -> Text:
    return Text("-" if value is None else f"{value:{style}}")


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
