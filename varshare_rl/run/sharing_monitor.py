"""The sharing made visible while a run trains: scalars, pictures and histograms, and a document per observation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varshare_rl.algorithms.base import Algorithm
from varshare_rl.errors import UserError
from varshare_rl.files import to_json, write_atomically
from varshare_rl.nn.sharing import LayerSharing, measure_sharing
from varshare_rl.ops.task_weights import cosines
from varshare_rl.reporting.clusters import cluster_tasks
from varshare_rl.reporting.layers import short_names
from varshare_rl.reporting.palettes import DIVERGING
from varshare_rl.reporting.previews import heat_map
from varshare_rl.run.tracker import Image, Tracker
from varshare_rl.types import Metrics

FOLDER = "sharing"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Conflict:
    """Inner products ``[T, T]`` of the tasks' gradients by network, and the transitions at their update."""

    transitions: int
    grams: Mapping[str, Tensor]


def sharing_document(
    modules: Mapping[str, nn.Module],
    task_names: Sequence[str],
    transitions: int,
    conflict: Conflict | None = None,
) -> dict[str, Any]:
    """Return everything that the pictures of sharing are drawn from, as plain values.

    Lists per task are in the order of ``tasks``; None where a network has no such thing (``nats`` without a
    posterior, everything but ``conflict`` without weights per task); NaN, null in a file, for a cosine with a zero
    vector. docs/sharing.md explains each entry.
    """
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "transitions": transitions,
        "tasks": list(task_names),
        "conflict": None if conflict is None else _conflict(conflict),
    }
    found = measure_sharing(modules)
    if found is None:
        return document | {
            "sharing": None, "nats": None, "residual": None, "spread": None, "layers": [],
            "similarity": None, "distance": None, "clusters": None,
        }  # fmt: skip
    distance = found.distance().numpy()
    return document | {
        "sharing": found.sharing,
        "nats": _list(found.nats),
        "residual": _list(found.residual),
        "spread": _list(found.relative_sigma),
        "layers": [_layer(layer) for layer in found.layers],
        "similarity": _list(found.similarity()),
        "distance": distance.tolist(),
        "clusters": asdict(cluster_tasks(distance)),
    }


def _layer(layer: LayerSharing) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": [layer.rows, layer.columns],
        "sharing": layer.sharing,
        "nats": _list(layer.nats),
        "residual_norm": _list(layer.residual_norm),
        "residual": _list(layer.residual),
        "spread_rms": _list(layer.sigma),
        "spread": _list(layer.relative_sigma),
        "effective_rank": _list(layer.effective_rank),
        "histograms": {name: asdict(histogram) for name, histogram in layer.histograms.items()},
    }


def _conflict(conflict: Conflict) -> dict[str, Any]:
    networks = {}
    for name, gram in conflict.grams.items():
        matrix = cosines(gram.cpu())
        pairs = matrix[tuple(torch.triu_indices(len(matrix), len(matrix), offset=1))].numpy()
        known = pairs[~np.isnan(pairs)]
        networks[name] = {
            "cosine": _list(matrix),
            "negative_share": float((known < 0).mean()) if len(known) else None,
            "mean_cosine": float(known.mean()) if len(known) else None,
        }
    return {"transitions": conflict.transitions, "networks": networks}


def _list(values: Tensor | None) -> Any:
    return None if values is None else values.tolist()


class SharingMonitor:
    """Measures an algorithm's networks and writes down what it finds. Reads only: training stays as it is.

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
        """Measure and write down, right after an update that was asked to measure conflict."""
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
        document = json.loads(path.read_bytes())
        version = document["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged observation {str(path)!r}; remove that file to go on without it") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{str(path)!r} has format version {version!r}; this version of varshare_rl reads {FORMAT_VERSION}"
        )
    return dict(document)


def scalars(document: Mapping[str, Any]) -> Metrics:
    """Return the metrics of a document: per layer the mean over tasks, per task that over all layers together."""
    metrics: Metrics = {}
    if document["sharing"] is not None:
        metrics["sharing/all"] = document["sharing"]
        metrics["sharing/clusters"] = float(document["clusters"]["count"])
    for layer in document["layers"]:
        metrics[f"sharing/{layer['name']}"] = layer["sharing"]
        metrics[f"effective_rank/{layer['name']}"] = sum(layer["effective_rank"]) / len(layer["effective_rank"])
    for name in ("residual", "spread"):
        for task, value in zip(document["tasks"], document[name] or (), strict=False):
            metrics[f"{name}/{task}"] = value
    for network, found in (document["conflict"] or {"networks": {}})["networks"].items():
        for name in ("negative_share", "mean_cosine"):
            if found[name] is not None:
                metrics[f"conflict/{network}/{name}"] = found[name]
    return metrics


def previews(document: Mapping[str, Any]) -> dict[str, Image]:
    """Return heat maps by name, small and quick to draw; matrices between tasks in the order of the tree."""
    tasks, images = document["tasks"], {}
    order = document["clusters"]["order"] if document["clusters"] else list(range(len(tasks)))

    def between_tasks(matrix: list[list[float]], title: str, low: float, high: float) -> Image:
        names = [tasks[task] for task in order]
        rows = [[matrix[task][other] for other in order] for task in order]
        return heat_map(rows, names, names, title, low, high, *((DIVERGING,) if low < 0 else ()))

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
