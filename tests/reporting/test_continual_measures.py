"""The measures of continual learning against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from varshare_rl.reporting.continual_measures import (
    as_results,
    backward_transfer,
    document_results,
    final_performance,
    forgetting,
    forward_transfer,
    learnt_performance,
    mean_or_none,
    measures,
    normalized_area,
    performance_throughout,
    pooled_reference,
    zero_shot_transfer,
)

# Row 0 is before learning; every entry is different, so that no other entry gives the same answer.
RESULTS = as_results([
    [0.01, 0.02, 0.04],
    [0.90, 0.12, 0.34],
    [0.50, 0.80, 0.26],
    [0.30, 0.85, 0.70],
])  # fmt: skip


def document(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "tasks": ["a", "b", "c"],
        "old_tasks": 0,
        "success": RESULTS.tolist(),
        "return": (100 * RESULTS).tolist(),
        "curves": [
            {"transitions": [0, 100, 200], "success": [0.0, 1.0, 1.0]},
            {"transitions": [0, 100, 200], "success": [0.0, 0.5, 1.0]},
            {"transitions": [0, 100, 200], "success": [0.0, 0.0, 0.4]},
        ],
    }
    return made | changes


def test_the_measures_by_hand() -> None:
    assert learnt_performance(RESULTS).tolist() == [0.90, 0.80, 0.70]
    assert final_performance(RESULTS).tolist() == [0.30, 0.85, 0.70]
    np.testing.assert_allclose(forgetting(RESULTS), [0.60, -0.05, 0.0], atol=1e-12)
    np.testing.assert_allclose(backward_transfer(RESULTS), [-0.60, 0.05], atol=1e-12)
    np.testing.assert_allclose(zero_shot_transfer(RESULTS), [0.12 - 0.02, 0.26 - 0.04], atol=1e-12)
    assert performance_throughout(RESULTS) == pytest.approx((0.9 + 0.5 + 0.8 + 0.3 + 0.85 + 0.7) / 6)


def test_the_measures_against_the_equations_term_by_term() -> None:
    """The sums as the papers write them, with tasks from 1, on a random matrix."""
    n = 6
    results = np.random.default_rng(3).random((n + 1, n))

    def entry(i: int, j: int) -> float:
        return float(results[i, j - 1])

    assert mean_or_none(final_performance(results)) == pytest.approx(sum(entry(n, j) for j in range(1, n + 1)) / n)
    assert mean_or_none(forgetting(results)) == pytest.approx(
        sum(entry(i, i) - entry(n, i) for i in range(1, n + 1)) / n
    )
    assert mean_or_none(backward_transfer(results)) == pytest.approx(
        sum(entry(n, i) - entry(i, i) for i in range(1, n)) / (n - 1)
    )
    assert mean_or_none(zero_shot_transfer(results)) == pytest.approx(
        sum(entry(i - 1, i) - entry(0, i) for i in range(2, n + 1)) / (n - 1)
    )
    lower = [entry(i, j) for i in range(1, n + 1) for j in range(1, i + 1)]
    assert performance_throughout(results) == pytest.approx(sum(lower) / (n * (n + 1) / 2))


@pytest.mark.parametrize(
    ("transitions", "success", "area"),
    [
        ([0, 10], [0.0, 1.0], 0.5),
        ([0, 10, 40], [0.0, 1.0, 1.0], (5 + 30) / 40),
        ([500, 510, 540], [0.0, 1.0, 1.0], (5 + 30) / 40),  # a window within the sequence
        ([0, 30, 40], [0.2, 0.4, 1.0], (9 + 7) / 40),
        ([0, 7, 9], [1.0, 1.0, 1.0], 1.0),
        ([0, 10], [0.5, None], None),
        ([10], [0.5], 0.5),
        ([10], [None], None),
        ([], [], None),
    ],
)
def test_areas(transitions: list[float], success: list[float | None], area: float | None) -> None:
    assert normalized_area(transitions, success) == (None if area is None else pytest.approx(area))


@pytest.mark.parametrize(
    ("transitions", "success", "named"),
    [([0, 1], [0.5], "2 transitions and 1 successes"), ([0, 5, 5], [0.0, 0.0, 0.0], "do not rise")],
)
def test_areas_of_what_is_no_curve(transitions: list[float], success: list[float | None], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        normalized_area(transitions, success)


@pytest.mark.parametrize(
    ("area", "reference", "transfer"),
    [
        (0.75, 0.5, 0.5),
        (0.25, 0.5, -0.5),
        (0.5, 0.5, 0.0),
        (1.0, 0.2, 1.0),
        (0.0, 0.9, -9.0),
        (0.9, 1.0, None),
        (1.0, 1.0 - 1e-16, None),
        (None, 0.5, None),
        (0.5, None, None),
    ],
)
def test_forward_transfer(area: float | None, reference: float | None, transfer: float | None) -> None:
    assert forward_transfer(area, reference) == (None if transfer is None else pytest.approx(transfer))


def test_the_measures_of_a_document() -> None:
    found = measures(document())
    assert found["measure"] == "success"
    assert found["performance"] == pytest.approx((0.30 + 0.85 + 0.70) / 3)
    assert found["forgetting"] == pytest.approx(0.55 / 3)  # over all three tasks
    assert found["backward_transfer"] == pytest.approx(-0.55 / 2)  # over two
    assert found["zero_shot_transfer"] == pytest.approx((0.10 + 0.22) / 2)
    assert found["forward_transfer"] is None  # no reference
    assert found["old_change"] is None
    assert [row["task"] for row in found["per_task"]] == ["a", "b", "c"]
    assert [row["area"] for row in found["per_task"]] == pytest.approx([0.75, 0.5, 0.1])
    assert found["per_task"][0]["zero_shot_transfer"] is None
    assert found["per_task"][2]["zero_shot_transfer"] == pytest.approx(0.22)
    assert found["per_task"][0]["forgetting"] == pytest.approx(0.6)


def test_forward_transfer_against_references_by_name() -> None:
    """Two curves of b are averaged; c was perfect alone, so nothing could be gained there."""
    reference = {
        "tasks": ["b", "c", "b (2)", "a"],
        "old_tasks": 0,
        "curves": [
            {"transitions": [0, 200], "success": [0.0, 0.4]},
            {"transitions": [0, 200], "success": [1.0, 1.0]},
            {"transitions": [0, 200], "success": [0.0, 0.8]},
            {"transitions": [0, 200], "success": [0.0, 1.0]},
        ],
    }
    found = measures(document(), reference)
    transfers = [(0.75 - 0.5) / 0.5, (0.5 - 0.3) / 0.7, None]
    assert [row["forward_transfer"] for row in found["per_task"][:2]] == pytest.approx(transfers[:2])
    assert found["per_task"][2]["forward_transfer"] is None
    assert found["per_task"][1]["reference_area"] == pytest.approx(0.3)
    assert found["forward_transfer"] == pytest.approx((0.5 + 2 / 7) / 2)


def test_forward_transfer_over_runs_is_the_ratio_of_means_task_by_task() -> None:
    """Equation 4 of Wolczyk et al. 2021 with areas that are means over seeds, as their code has it."""
    rng = np.random.default_rng(1)
    areas, alone = rng.random((5, 3)), rng.random((4, 3)) * 0.9

    def run(row: npt.NDArray[np.float64]) -> dict[str, Any]:
        return document(curves=[{"transitions": [0, 10], "success": [float(area)] * 2} for area in row])

    reference = pooled_reference([run(row) for row in alone])
    found = [measures(run(row), reference) for row in areas]
    wanted = np.mean((areas.mean(0) - alone.mean(0)) / (1 - alone.mean(0)))
    assert np.mean([one["forward_transfer"] for one in found]) == pytest.approx(wanted)
    by_task = [np.mean([one["per_task"][task]["forward_transfer"] for one in found]) for task in range(3)]
    assert by_task == pytest.approx((areas.mean(0) - alone.mean(0)) / (1 - alone.mean(0)))


def test_a_run_is_no_better_than_itself() -> None:
    assert measures(document(), document())["forward_transfer"] == pytest.approx(0.0)


def test_references_are_pooled() -> None:
    with_old = document(tasks=["x", "a", "b", "c"], old_tasks=1)
    pooled = pooled_reference([document(), with_old])
    assert pooled["tasks"] == ["a", "b", "c"] * 2
    assert len(pooled["curves"]) == 6
    assert measures(document(), pooled)["forward_transfer"] == pytest.approx(0.0)


def test_old_tasks_count_in_their_change_alone() -> None:
    old = np.array([[0.9, 0.4], [0.1, 0.1], [0.2, 0.2], [0.6, 0.5]])
    rows = np.hstack([old, RESULTS]).tolist()
    found = measures(document(tasks=["x", "y", "a", "b", "c"], old_tasks=2, success=rows))
    assert found["old_change"] == pytest.approx((-0.3 + 0.1) / 2)
    plain = measures(document())
    assert {**found, "old_change": None} == plain


def test_a_suite_without_success_is_measured_by_return() -> None:
    nothing = [{"transitions": [0, 100], "success": None}] * 3
    for success in (None, [[None] * 3] * 4):
        found = measures(document(success=success, curves=nothing), document())
        assert found["measure"] == "return"
        assert found["performance"] == pytest.approx(100 * (0.30 + 0.85 + 0.70) / 3)
        assert found["forward_transfer"] is None


def test_what_was_not_measured_is_none() -> None:
    """Methods that have no policy for tasks to come cannot be tried on them."""
    rows = [[None] * 3, [0.9, None, None], [0.5, 0.8, None], [0.3, 0.85, 0.7]]
    found = measures(document(success=rows))
    assert found["zero_shot_transfer"] is None
    assert found["performance"] == pytest.approx((0.30 + 0.85 + 0.70) / 3)
    assert found["forgetting"] == pytest.approx(0.55 / 3)
    rows[2][1] = None
    found = measures(document(success=rows))
    assert found["forgetting"] is None
    assert found["per_task"][1] == {
        "task": "b", "learnt": None, "performance": 0.85, "forgetting": None, "zero_shot_transfer": None,
        "area": 0.5, "reference_area": None, "forward_transfer": None,
    }  # fmt: skip


def test_one_task_has_no_transfer_between_tasks() -> None:
    one = document(tasks=["a"], success=[[0.1], [0.9]], curves=document()["curves"][:1])
    found = measures(one)
    assert (found["performance"], found["forgetting"]) == (0.9, 0.0)
    assert found["backward_transfer"] is None
    assert found["zero_shot_transfer"] is None


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\[3, 3\]"):
        as_results(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="3 learnt tasks, 3 results, 2 curves"):
        measures(document(curves=document()["curves"][:2]))
    name, matrix = document_results(document())
    assert (name, matrix.shape) == ("success", (4, 3))
