"""Logs of a run while it goes on: ``metrics.jsonl`` and TensorBoard events, in the run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from varshare_rl.errors import UserError
from varshare_rl.files import to_json, write_atomically
from varshare_rl.overrides import override

#: Height, width and three bytes of colour.
Image = npt.NDArray[np.uint8]

METRICS_FILE = "metrics.jsonl"
FLUSH_SECONDS = 2  # what a crash may cost TensorBoard; metrics.jsonl is flushed with every line


class Tracker:
    """Writes scalars by transition count to ``metrics.jsonl`` and to TensorBoard.

    A line is ``{"transitions": ..., "seconds": ..., <name>: <value>, ...}``: transitions of all tasks
    together, seconds of this run including those before a resume, NaN and infinities as null.
    """

    def __init__(self, run_dir: Path, resumed_at: int | None = None, seconds: float = 0.0) -> None:
        """Open the files of a run, which is new unless ``resumed_at`` gives the transitions it goes on from.

        ``seconds`` is how long it has run before.

        On resume everything logged after ``resumed_at`` transitions is taken back. Raises :class:`UserError`
        if a new run's folder already holds metrics.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        if resumed_at is not None:
            _cut_back(path, resumed_at)
        elif path.exists() and path.stat().st_size:
            raise UserError(
                f"run folder {str(run_dir)!r} already holds a run: choose another run_dir, or "
                f"{override('resume', run_dir)} to go on with it"
            )
        self._started = time.monotonic() - seconds
        self._lines = path.open("a", encoding="utf-8")
        # TensorBoard drops what earlier sessions wrote at this step and above. Its Python reader takes the
        # first mark it meets for the start of the run, so a new run makes one too.
        purge_step = 0 if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(run_dir), purge_step=purge_step, flush_secs=FLUSH_SECONDS)
        self._latest_step = resumed_at or 0
        self._latest_names: set[str] = set()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this run, with those before a resume."""
        return time.monotonic() - self._started

    def log(self, metrics: Mapping[str, float], transitions: int) -> None:
        """Write scalars, by metric name, at a count of transitions that never decreases."""
        line = {"transitions": transitions, "seconds": round(self.seconds, 3)}
        values = {name: float(value) for name, value in metrics.items()}
        self._lines.write(to_json(line | values) + "\n")
        self._lines.flush()
        if transitions != self._latest_step:
            self._latest_step, self._latest_names = transitions, set()
        for name, value in values.items():
            self._writer.add_scalar(name, value, transitions)
        self._latest_names.update(values)

    def images(self, images: Mapping[str, Image], transitions: int) -> None:
        """Show images ``[height, width, 3]`` in TensorBoard, by name."""
        for name, image in images.items():
            self._writer.add_image(name, image, transitions, dataformats="HWC")

    def histograms(self, histograms: Mapping[str, Mapping[str, Any]], transitions: int) -> None:
        """Show histograms in TensorBoard, by name: ``counts`` in equal bins from ``low`` to ``high``.

        ``total`` and ``squares`` are the sums of the values and of their squares.
        """
        for name, found in histograms.items():
            counts = found["counts"]
            limits = np.linspace(found["low"], found["high"], len(counts) + 1)[1:]
            self._writer.add_histogram_raw(
                name, found["low"], found["high"], sum(counts), found["total"], found["squares"],
                limits.tolist(), counts, transitions,
            )  # fmt: skip

    def hparams(self, hparams: Mapping[str, bool | int | float | str], metrics: Mapping[str, float]) -> None:
        """Show this run in TensorBoard's HParams tab, with final metrics. Call once, at the end.

        ``SummaryWriter.add_hparams`` would make a second run in a folder below; the same summaries written
        here belong to this run.
        """
        # torch writes a bool as a number, which the tab shows as 0 or 1
        values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in hparams.items()}
        finals = {name: float(value) for name, value in metrics.items()}
        for name in finals.keys() - self._latest_names:
            self._writer.add_scalar(name, finals[name], self._latest_step)
        self._latest_names.update(finals)
        file_writer: Any = self._writer.file_writer  # declared as None in torch, set once the writer is open
        for summary in hparams_summaries(values, finals):  # type: ignore[no-untyped-call]
            file_writer.add_summary(summary)
        self._writer.flush()

    def close(self) -> None:
        """Write everything out and close the files. May be called twice."""
        self._lines.close()
        self._writer.close()


def _cut_back(path: Path, resumed_at: int) -> None:
    """Drop the lines after ``resumed_at`` transitions."""
    if not path.exists():
        return
    kept: list[str] = []
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
    write_atomically(path, "".join(kept))
