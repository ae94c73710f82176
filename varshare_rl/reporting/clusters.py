"""Which tasks ended up with nearly the same weights: a tree of tasks, and its clusters at a fixed height."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform

#: Tasks whose weights are on average nearer than this, relative to their size, count as one cluster.
CLUSTER_DISTANCE = 0.1


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
    """Average linkage (Sokal and Michener 1958) on a distance matrix ``[T, T]``, symmetric with zeros inside."""
    matrix = np.asarray(distance, dtype=np.float64)
    if len(matrix) < 2:
        return Clusters(threshold, len(matrix), [0] * len(matrix), list(range(len(matrix))), [])
    tree = linkage(squareform((matrix + matrix.T) / 2, checks=False), method="average")
    order = leaves_list(tree).tolist()
    found = fcluster(tree, threshold, criterion="distance")
    first_seen = list(dict.fromkeys(int(found[task]) for task in order))
    labels = [first_seen.index(int(label)) for label in found]
    return Clusters(threshold, len(first_seen), labels, order, tree.tolist())
