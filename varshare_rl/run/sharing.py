"""What a run and a report write down of the sharing: one form of document, made here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varshare_rl.nn.sharing import LayerSharing, measure_sharing
from varshare_rl.ops.task_weights import cosines
from varshare_rl.reporting.clusters import cluster_tasks

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
    """Everything that the pictures of sharing are drawn from, as plain values.

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
