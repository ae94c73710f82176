"""Monitor of sharing while a run trains: scalars, pictures and histograms, and a file per observation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from varshare_rl.algorithms.base import Algorithm
from varshare_rl.errors import UserError
from varshare_rl.files import to_json, write_atomically
from varshare_rl.reading import read_object
from varshare_rl.reporting.previews import heat_map
from varshare_rl.reporting.style import DIVERGING, short_names
from varshare_rl.run.sharing import FORMAT_VERSION, Conflict, sharing_document
from varshare_rl.run.tracker import Image, Tracker
from varshare_rl.types import Metrics

FOLDER = "sharing"


class SharingMonitor:
    """Measures an algorithm's networks and writes the results. Reads only: training stays as it is.

    Args:
        run_dir: ``<run_dir>/sharing/<transitions>.json`` are written.
        task_names: of the suite, in order.
        tracker: takes scalars, images and histograms.
        resumed_at: observations after so many transitions are taken back.
    """

    def __init__(
        self, run_dir: Path, task_names: tuple[str, ...], tracker: Tracker, resumed_at: int | None = None
    ) -> None:
        self.folder = run_dir / FOLDER
        self.task_names = task_names
        self.tracker = tracker
        if resumed_at is not None:
            for path in self.folder.glob("*.json"):
                if path.stem.isdecimal() and int(path.stem) > resumed_at:
                    path.unlink()

    def observe(self, algorithm: Algorithm, transitions: int) -> None:
        """Measure and write, right after an update that was asked to measure conflict."""
        grams = algorithm.gradient_grams()
        conflict = Conflict(transitions, grams) if grams else None
        document = sharing_document(algorithm.trained_modules(), self.task_names, transitions, conflict)
        self.folder.mkdir(exist_ok=True)
        write_atomically(self.folder / f"{transitions:012d}.json", to_json(document) + "\n")
        self.tracker.log(scalars(document), transitions)
        self.tracker.images(previews(document), transitions)
        histograms = {
            f"{layer['name']}/{name}": histogram
            for layer in document["layers"]
            for name, histogram in layer["histograms"].items()
        }
        self.tracker.histograms({f"posterior/{name}": values for name, values in histograms.items()}, transitions)


def latest_observation(run_dir: Path, transitions: int) -> dict[str, Any] | None:
    """Return the last document that a run wrote up to so many ``transitions``; None if there is none.

    Raises:
        UserError: the file is damaged.
    """
    found = [path for path in (run_dir / FOLDER).glob("*.json") if path.stem.isdecimal()]
    earlier = [path for path in found if int(path.stem) <= transitions]
    if not earlier:
        return None
    path = max(earlier, key=lambda path: int(path.stem))
    try:
        document = read_object(path)
    except UserError as error:
        raise UserError(f"damaged observation: {error}; remove that file to go on without it") from error
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{str(path)!r} has format version {version!r}; this version of varshare_rl reads {FORMAT_VERSION}"
        )
    return document


def scalars(document: Mapping[str, Any]) -> Metrics:
    """Return the metrics of a document: per layer the mean over tasks, per task that over all layers together."""
    metrics: Metrics = {}
    if document["sharing"] is not None:
        metrics["sharing/all"] = document["sharing"]
        metrics["sharing/clusters"] = float(document["clusters"]["count"])
    for layer in document["layers"]:
        metrics[f"sharing/{layer['name']}"] = layer["sharing"]
        metrics[f"effective_rank/{layer['name']}"] = sum(layer["effective_rank"]) / len(layer["effective_rank"])
    for name in ("residual", "sigma"):
        for task, value in zip(document["tasks"], document[name] or (), strict=False):
            metrics[f"{name}/{task}"] = value
    for network, found in (document["conflict"] or {"networks": {}})["networks"].items():
        for name in ("negative_share", "mean_cosine"):
            if found[name] is not None:
                metrics[f"conflict/{network}/{name}"] = found[name]
    return metrics


def previews(document: Mapping[str, Any]) -> dict[str, Image]:
    """Draw heat maps by name, small and quick to draw; tasks in the order of the suite, the same in every run."""
    tasks, images = document["tasks"], {}

    def between_tasks(matrix: list[list[float]], title: str, low: float, high: float) -> Image:
        return heat_map(matrix, tasks, tasks, title, low, high, *((DIVERGING,) if low < 0 else ()))

    if document["distance"] is not None:
        most = max(max(row) for row in document["distance"])
        images["sharing/distance"] = between_tasks(document["distance"], "distance of weights", 0.0, most)
        images["sharing/similarity"] = between_tasks(document["similarity"], "cosine of residuals", -1.0, 1.0)
    nats = {layer["name"]: layer["nats"] for layer in document["layers"] if layer["nats"] is not None}
    if nats:
        most = max(max(row) for row in nats.values())
        images["sharing/nats"] = heat_map(list(nats.values()), short_names(nats), tasks, "nats", 0.0, most)
    for network, found in (document["conflict"] or {"networks": {}})["networks"].items():
        title = f"cosine of gradients, {network}"
        images[f"conflict/{network}"] = between_tasks(found["cosine"], title, -1.0, 1.0)
    return images
