"""A table of all scalars, ``metrics.csv`` in the run folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass

from varshare_rl.files import write_atomically
from varshare_rl.registry import register
from varshare_rl.run.tracker import TrackedRun, TrackerBackend

FILE = "metrics.csv"
COLUMNS = ("transitions", "name", "value")


@register("tracker", "csv")
@dataclass
class CsvConfig:
    """``csv``: ``metrics.csv``, a row ``transitions,name,value`` for every scalar."""

    def build(self, run: TrackedRun) -> CsvTracker:
        """Open the file."""
        return CsvTracker(run)


class CsvTracker(TrackerBackend):
    """Appends a row per scalar; what was written after the transitions that a run goes on from is taken back."""

    def __init__(self, run: TrackedRun) -> None:
        path = run.run_dir / FILE
        kept = []
        if run.resumed_at is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
            counts = [line.partition(",")[0] for line in lines]
            kept = [
                line
                for line, count in zip(lines, counts, strict=True)
                if count.isdecimal() and int(count) <= run.resumed_at and line.endswith("\n")
            ]
        write_atomically(path, ",".join(COLUMNS) + "\n" + "".join(kept))
        self._file = path.open("a", encoding="utf-8", newline="")
        self._rows = csv.writer(self._file, lineterminator="\n")

    def scalars(self, values: Mapping[str, float], transitions: int) -> None:
        """See ``TrackerBackend.scalars``."""
        self._rows.writerows((transitions, name, value) for name, value in values.items())
        self._file.flush()

    def close(self) -> None:
        """See ``TrackerBackend.close``."""
        self._file.close()
