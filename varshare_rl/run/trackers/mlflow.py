"""MLflow. Its own variables choose where: MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from varshare_rl.errors import UserError, missing_extra
from varshare_rl.files import write_atomically
from varshare_rl.registry import register
from varshare_rl.run.tracker import Options, TrackedRun, TrackerBackend

ID_FILE = "mlflow_id.txt"
EXPERIMENT = "varshare_rl"
MOST_PARAMETERS, MOST_METRICS = 100, 1000  # of one request


@register("tracker", "mlflow")
@dataclass
class MlflowConfig:
    """``mlflow``: MLflow, by default with files in ``mlruns`` beside the run folder."""

    def build(self, run: TrackedRun) -> MlflowTracker:
        """Begin a run there, or go on with the one that this run had. Raises UserError where that is refused."""
        try:
            import mlflow
        except ImportError as error:
            raise missing_extra("log.trackers needs mlflow", "mlflow") from error
        return MlflowTracker(run, mlflow)


class MlflowTracker(TrackerBackend):
    """Logs scalars and options. What was logged after the point that a run goes on from stays there."""

    def __init__(self, run: TrackedRun, mlflow: Any) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            uri = (run.run_dir.resolve().parent / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow asks for it since its version 3
        path = run.run_dir / ID_FILE
        self._entities, self._ended = mlflow.entities, False
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            if path.exists():
                self._id = path.read_text(encoding="utf-8").strip()
                self._client.update_run(self._id, status="RUNNING")
            else:
                self._id = self._client.create_run(self._experiment(), run_name=run.run_dir.name).info.run_id
        except mlflow.exceptions.MlflowException as error:
            raise UserError(
                f"MLflow refuses {uri} ({' '.join(str(error).split())}); give another MLFLOW_TRACKING_URI"
            ) from error
        write_atomically(path, f"{self._id}\n")

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        known = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if known is None else known.experiment_id)

    def begin(self, options: Options, metrics: Sequence[str]) -> None:
        """See ``TrackerBackend.begin``; options that the run has there already stay."""
        known = self._client.get_run(self._id).data.params
        made = (self._entities.Param(key, str(value)) for key, value in options.items() if key not in known)
        for part in _parts(made, MOST_PARAMETERS):
            self._client.log_batch(self._id, params=part)

    def scalars(self, values: Mapping[str, float], transitions: int) -> None:
        """See ``TrackerBackend.scalars``; what MLflow takes for no letter of a name becomes ``_``."""
        now = int(1000 * time.time())
        made = (
            self._entities.Metric(re.sub(r"[^\w./: -]", "_", name), value, now, transitions)
            for name, value in values.items()
        )
        for part in _parts(made, MOST_METRICS):
            self._client.log_batch(self._id, metrics=part)

    def end(self) -> None:
        """See ``TrackerBackend.end``."""
        self._ended = True

    def close(self) -> None:
        """See ``TrackerBackend.close``."""
        self._client.set_terminated(self._id, "FINISHED" if self._ended else "KILLED")


def _parts(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(values)
    while part := list(islice(iterator, size)):
        yield part
