"""Documents of sharing, as runs and reports write them: measures of all layers, and clusters of alike tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from varshare_rl.nn.sharing import LayerSharing, measure_sharing
from varshare_rl.ops.task_weights import cosines

FORMAT_VERSION = 1
#: Tasks whose weights are on average nearer than this, relative to their size, count as one cluster.
CLUSTER_DISTANCE = 0.1


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
    """Return all numbers that figures of sharing are drawn from, as plain values.

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
            "sharing": None, "nats": None, "residual": None, "sigma": None, "layers": [],
            "similarity": None, "distance": None, "clusters": None,
        }  # fmt: skip
    distance = found.distance().numpy()
    return document | {
        "sharing": found.sharing,
        "nats": _list(found.nats),
        "residual": _list(found.residual),
        "sigma": _list(found.relative_sigma),
        "layers": [_layer(layer) for layer in found.layers],
        "similarity": _list(found.similarity()),
        "distance": distance.tolist(),
        "clusters": asdict(cluster_tasks(distance)),
    }


@dataclass(frozen=True)
class Clusters:
    """Agglomerative clustering of ``T`` tasks.

    Attributes:
        threshold: the height at which the tree is cut.
        count: number of clusters there.
        labels: cluster of each task, from 0, in the order of the tree.
        order: task ids from one end of the tree to the other; neighbours are alike.
        linkage: ``[T - 1, 4]`` as scipy has it: the two that merge, the height, the size of the union.
    """

    threshold: float
    count: int
    labels: list[int]
    order: list[int]
    linkage: list[list[float]]


def cluster_tasks(distance: npt.ArrayLike, threshold: float = CLUSTER_DISTANCE) -> Clusters:
    """Cluster by average linkage (Sokal and Michener 1958) on symmetric distances ``[T, T]`` with zeros inside."""
    matrix = np.asarray(distance, dtype=np.float64)
    if len(matrix) < 2:
        return Clusters(threshold, len(matrix), [0] * len(matrix), list(range(len(matrix))), [])
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage  # take a second to import
    from scipy.spatial.distance import squareform

    tree = linkage(squareform((matrix + matrix.T) / 2, checks=False), method="average")
    order = leaves_list(tree).tolist()
    flat = fcluster(tree, threshold, criterion="distance")
    first_seen = list(dict.fromkeys(int(flat[task]) for task in order))
    labels = [first_seen.index(int(label)) for label in flat]
    return Clusters(threshold, len(first_seen), labels, order, tree.tolist())


def _layer(layer: LayerSharing) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": [layer.rows, layer.columns],
        "sharing": layer.sharing,
        "nats": _list(layer.nats),
        "residual_norm": _list(layer.residual_norm),
        "residual": _list(layer.residual),
        "sigma_rms": _list(layer.sigma),
        "sigma": _list(layer.relative_sigma),
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
