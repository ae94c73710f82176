"""Logs of a run while it goes on: ``metrics.jsonl`` in the run folder, and the trackers of ``log.trackers``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from varshare_rl.errors import UserError
from varshare_rl.files import to_json, write_atomically
from varshare_rl.overrides import override
from varshare_rl.registry import lookup
from varshare_rl.run_files import METRICS_FILE

#: Height, width and three bytes of colour.
Image = npt.NDArray[np.uint8]
#: Options of a run by dotted name.
Options = Mapping[str, bool | int | float | str]


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker must know it.

    Attributes:
        run_dir: its folder.
        resumed_at: transitions that it goes on from; None for a new run.
        task_names: of its suite, in order.
    """

    run_dir: Path
    resumed_at: int | None = None
    task_names: Sequence[str] = ()


class TrackerBackend:
    """Takes what a run logs, at counts of transitions that never decrease; this one takes no notice of anything.

    A component of the group ``tracker`` builds it from a :class:`TrackedRun`.
    """

    def begin(self, options: Options, metrics: Sequence[str]) -> None:
        """Take note of the run's options, and of the names of the scalars that runs are compared by."""

    def scalars(self, values: Mapping[str, float], transitions: int) -> None:
        """Take scalars by metric name."""

    def images(self, images: Mapping[str, Image], transitions: int) -> None:
        """Take images ``[height, width, 3]`` by name."""

    def histograms(self, histograms: Mapping[str, Mapping[str, Any]], transitions: int) -> None:
        """Take histograms by name: ``counts`` in equal bins from ``low`` to ``high``.

        ``total`` and ``squares`` are the sums of the values and of their squares.
        """

    def end(self) -> None:
        """Take note that the run has done all of its transitions; a run that was stopped does not say so."""

    def close(self) -> None:
        """Write everything out. May be called twice."""


class Tracker:
    """Writes scalars by transition count to ``metrics.jsonl``, and hands them and pictures to the trackers chosen.

    A line is ``{"transitions": ..., "seconds": ..., <name>: <value>, ...}``: transitions of all tasks
    together, seconds of this run including those before a resume, NaN and infinities as null.

    Attributes:
        evaluated: there is an evaluation at the transitions that the run goes on from; one that is made again there
            is the same.
    """

    def __init__(
        self,
        run_dir: Path | None,
        resumed_at: int | None = None,
        seconds: float = 0.0,
        trackers: Sequence[str] = ("tensorboard",),
        task_names: Sequence[str] = (),
    ) -> None:
        """Open the files of a run, which is new unless ``resumed_at`` gives the transitions it goes on from.

        Without a ``run_dir`` nothing is written.

        ``seconds`` is how long it has run before.

        On resume everything logged after ``resumed_at`` transitions is taken back. Raises :class:`UserError`
        if a new run's folder already holds metrics, or a tracker is unknown, not installed or refuses.
        """
        builders = [lookup("tracker", name) for name in dict.fromkeys(trackers)]
        self._started = time.monotonic() - seconds
        self._backends: list[TrackerBackend] = []
        self.evaluated = False
        if run_dir is None:
            self._lines = open(os.devnull, "a", encoding="utf-8")  # noqa: SIM115
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        if resumed_at is not None:
            self.evaluated = _cut_back(path, resumed_at)
        elif path.exists() and path.stat().st_size:
            raise UserError(
                f"run folder {str(run_dir)!r} already holds a run: choose another run_dir, or "
                f"{override('resume', run_dir)} to go on with it"
            )
        try:
            for builder in builders:
                self._backends.append(builder().build(TrackedRun(run_dir, resumed_at, tuple(task_names))))
            self._lines = path.open("a", encoding="utf-8")
        except BaseException:
            for backend in self._backends:
                backend.close()
            raise

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this run, with those before a resume."""
        return time.monotonic() - self._started

    def begin(self, options: Options, metrics: Sequence[str]) -> None:
        """Say what the run is: its options, and the names of the scalars that runs are compared by."""
        for backend in self._backends:
            backend.begin(options, metrics)

    def log(self, metrics: Mapping[str, float], transitions: int) -> None:
        """Write scalars, by metric name, at a count of transitions that never decreases."""
        line = {"transitions": transitions, "seconds": round(self.seconds, 3)}
        values = {name: float(value) for name, value in metrics.items()}
        self._lines.write(to_json(line | values) + "\n")
        self._lines.flush()
        for backend in self._backends:
            backend.scalars(values, transitions)

    def images(self, images: Mapping[str, Image], transitions: int) -> None:
        """Show images ``[height, width, 3]``, by name."""
        for backend in self._backends:
            backend.images(images, transitions)

    def histograms(self, histograms: Mapping[str, Mapping[str, Any]], transitions: int) -> None:
        """Show histograms, by name, see :meth:`TrackerBackend.histograms`."""
        for backend in self._backends:
            backend.histograms(histograms, transitions)

    def end(self) -> None:
        """Say that the run has done all of its transitions."""
        for backend in self._backends:
            backend.end()

    def close(self) -> None:
        """Write everything out, as far as there is room, and close the files. May be called twice."""
        for close in (self._lines.close, *(backend.close for backend in self._backends)):
            with suppress(OSError):
                close()


def _cut_back(path: Path, resumed_at: int) -> bool:
    """Drop the lines after ``resumed_at`` transitions; returns whether there is an evaluation at them."""
    if not path.exists():
        return False
    kept, evaluated = list[str](), False
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            transitions = int(entry["transitions"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # the process died while it wrote this line
                break
            raise UserError(
                f"damaged metrics file {str(path)!r}: line {number} is not a JSON object with "
                "transitions; remove that line to go on"
            ) from error
        if transitions <= resumed_at:
            kept.append(line + "\n")
            evaluated = evaluated or (transitions == resumed_at and "eval/mean_return" in entry)
    write_atomically(path, "".join(kept))
    return evaluated
