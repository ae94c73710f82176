"""Weights & Biases. Its own variables choose the rest: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline, ..."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from varshare_rl.errors import UserError, missing_extra
from varshare_rl.files import write_atomically
from varshare_rl.registry import register
from varshare_rl.run.tracker import Image, Options, TrackedRun, TrackerBackend

ID_FILE = "wandb_id.txt"
PROJECT = "varshare_rl"
STEP = "transitions"


@register("tracker", "wandb")
@dataclass
class WandbConfig:
    """``wandb``: Weights & Biases, with its files in ``<run folder>/wandb``."""

    def build(self, run: TrackedRun) -> WandbTracker:
        """Begin a run there, or go on with the one that this run had. Raises UserError where that is refused."""
        try:
            import wandb
        except ImportError as error:
            raise missing_extra("log.trackers needs wandb", "wandb") from error
        return WandbTracker(run, wandb)


class WandbTracker(TrackerBackend):
    """Logs against ``transitions``. What was logged after the point that a run goes on from stays there."""

    def __init__(self, run: TrackedRun, wandb: Any) -> None:
        self._wandb = wandb
        path = run.run_dir / ID_FILE
        known = path.read_text(encoding="utf-8").strip() if path.exists() else None
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.run_dir.name,
                dir=str(run.run_dir),
                id=known,
                resume=None if known is None else "allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(f"wandb refuses ({reason}); use `wandb login`, or set WANDB_MODE=offline") from error
        write_atomically(path, f"{self._run.id}\n")
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        self._exit_code = 1

    def begin(self, options: Options, metrics: Sequence[str]) -> None:
        """See ``TrackerBackend.begin``."""
        self._run.config.update(dict(options), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], transitions: int) -> None:
        """See ``TrackerBackend.scalars``."""
        self._run.log({STEP: transitions, **values})

    def images(self, images: Mapping[str, Image], transitions: int) -> None:
        """See ``TrackerBackend.images``."""
        self._run.log({STEP: transitions} | {name: self._wandb.Image(image) for name, image in images.items()})

    def histograms(self, histograms: Mapping[str, Mapping[str, Any]], transitions: int) -> None:
        """See ``TrackerBackend.histograms``."""
        made: dict[str, Any] = {STEP: transitions}
        for name, found in histograms.items():
            edges = np.linspace(found["low"], found["high"], len(found["counts"]) + 1)
            made[name] = self._wandb.Histogram(np_histogram=(np.array(found["counts"]), edges))
        self._run.log(made)

    def end(self) -> None:
        """See ``TrackerBackend.end``."""
        self._exit_code = 0

    def close(self) -> None:
        """See ``TrackerBackend.close``."""
        self._run.finish(exit_code=self._exit_code)
