from __future__ import annotations

import numpy as np
import pytest

from varshare_rl.run.sharing import cluster_tasks


def test_two_pairs_and_a_loner() -> None:
    points = np.array([0.0, 5.0, 0.04, 5.02, 20.0])
    found = cluster_tasks(np.abs(points[:, None] - points))
    assert found.count == 3
    label = found.labels
    assert label[0] == label[2] != label[1] == label[3] != label[4] != label[0]
    assert sorted(found.order) == [0, 1, 2, 3, 4]
    assert abs(found.order.index(0) - found.order.index(2)) == 1
    assert abs(found.order.index(1) - found.order.index(3)) == 1
    assert [label[task] for task in found.order] == sorted(label)  # numbered along the tree
    # heights: the pairs, then the mean of 5, 5.02, 4.96 and 4.98, then that of the loner to all four
    assert [row[2] for row in found.linkage] == pytest.approx([0.02, 0.04, 4.99, 17.485])


def test_equal_tasks_are_one_cluster() -> None:
    assert cluster_tasks(np.zeros((6, 6))).count == 1


def test_the_threshold_decides() -> None:
    distance = np.array([[0.0, 0.3], [0.3, 0.0]])
    assert [cluster_tasks(distance, threshold).count for threshold in (0.29, 0.31)] == [2, 1]


def test_one_task_has_no_tree() -> None:
    found = cluster_tasks([[0.0]])
    assert (found.count, found.labels, found.order, found.linkage) == (1, [0], [0], [])
