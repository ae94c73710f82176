"""TensorBoard: ``events.out.tfevents.*`` in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from varshare_rl.registry import register
from varshare_rl.run.tracker import Image, Options, TrackedRun, TrackerBackend

FLUSH_SECONDS = 2  # what a crash may cost; metrics.jsonl is flushed with every line
#: TensorBoard sorts groups of cards, capitals first: these scalars are shown in the first one, too.
OVERVIEW = {
    "eval/mean_success": "Overview/1 success in evaluation",
    "eval/mean_return": "Overview/2 return in evaluation",
    "train/mean_success": "Overview/3 success in training",
    "train/mean_return": "Overview/4 return in training",
}


@register("tracker", "tensorboard")
@dataclass
class TensorBoardConfig:
    """``tensorboard``: curves, heat maps and options, shown by ``tensorboard --logdir runs``."""

    def build(self, run: TrackedRun) -> TensorBoard:
        """Open the file of events."""
        return TensorBoard(run)


class TensorBoard(TrackerBackend):
    """Writes events, a layout with the tasks in their order, and the options of the HParams tab."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        # TensorBoard drops what earlier sessions wrote at this step and above. Its Python reader takes the
        # first mark it meets for the start of the run, so a new run makes one too.
        purge_step = 0 if run.resumed_at is None else run.resumed_at + 1
        self._writer = SummaryWriter(str(run.run_dir), purge_step=purge_step, flush_secs=FLUSH_SECONDS)

    def begin(self, options: Options, metrics: Sequence[str]) -> None:
        """See ``TrackerBackend.begin``. ``SummaryWriter.add_hparams`` would make a second run in a folder below."""
        # torch writes a bool as a number, which the tab shows as 0 or 1
        values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in options.items()}
        experiment, start, _ = hparams_summaries(values, dict.fromkeys(metrics, 0.0))  # type: ignore[no-untyped-call]
        self._add(experiment, start)
        if self._run.task_names:
            self._writer.add_custom_scalars(layout(self._run.task_names))

    def scalars(self, values: Mapping[str, float], transitions: int) -> None:
        """See ``TrackerBackend.scalars``."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, transitions)
            if name in OVERVIEW:
                self._writer.add_scalar(OVERVIEW[name], value, transitions)

    def images(self, images: Mapping[str, Image], transitions: int) -> None:
        """See ``TrackerBackend.images``."""
        for name, image in images.items():
            self._writer.add_image(name, image, transitions, dataformats="HWC")

    def histograms(self, histograms: Mapping[str, Mapping[str, Any]], transitions: int) -> None:
        """See ``TrackerBackend.histograms``."""
        for name, found in histograms.items():
            counts = found["counts"]
            limits = np.linspace(found["low"], found["high"], len(counts) + 1)[1:]
            self._writer.add_histogram_raw(
                name, found["low"], found["high"], sum(counts), found["total"], found["squares"],
                limits.tolist(), counts, transitions,
            )  # fmt: skip

    def end(self) -> None:
        """See ``TrackerBackend.end``."""
        self._add(hparams_summaries({}, {})[2])  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """See ``TrackerBackend.close``."""
        self._writer.close()

    def _add(self, *summaries: Any) -> None:
        file_writer: Any = self._writer.file_writer  # declared as None in torch, set once the writer is open
        for summary in summaries:
            file_writer.add_summary(summary)
        self._writer.flush()


def layout(task_names: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the charts of the tab of custom scalars: the means, then every task's own, in order."""

    def charts(of: str) -> dict[str, list[Any]]:
        names = ("success", "return")
        return {name: ["Multiline", [f"{phase}/{of}{name}$" for phase in ("eval", "train")]] for name in names}

    means = charts("mean_")
    width = len(str(len(task_names)))
    tasks = {
        f"{number:0{width}d} {task}": charts(f"{task}/") | {"nats": ["Multiline", [f"kl/{task}$"]]}
        for number, task in enumerate(task_names, start=1)
    }
    return {"mean over tasks": means, **tasks}
