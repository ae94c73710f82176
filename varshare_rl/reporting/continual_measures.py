"""Measures of a sequence of tasks: performance, forgetting and transfer, as pure functions.

``results [N + 1, N]``, ``R`` below, has the success (or return) of ``N`` tasks: row 0 before anything is learnt,
row ``i`` after the ``i``-th task of the sequence. Tasks count from 1 in the equations, so ``R[i, i]`` is a task
right after it was learnt, and ``R[N, i]`` at the end. NaN is a value that nobody has measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Document = Mapping[str, Any]


def as_results(rows: Any) -> Values:
    """Return ``rows`` of numbers, with None for NaN, as ``[N + 1, N]``.

    Raises:
        ValueError: another shape, or no task.
    """
    results = np.asarray(rows, dtype=np.float64)
    if results.ndim != 2 or results.shape[0] != results.shape[1] + 1 or results.shape[1] == 0:
        raise ValueError(f"results have the shape {list(results.shape)}; N tasks make [N + 1, N]")
    return results


def final_performance(results: Values) -> Values:
    """Return every task at the end, ``R[N, i]``, as ``[N]``; its mean is the average performance ``P``.

    Wolczyk et al. 2021 (Continual World), Lopez-Paz and Ranzato 2017 (GEM, there ACC).
    """
    final: Values = results[-1]
    return final


def learnt_performance(results: Values) -> Values:
    """Return every task right after it was learnt, ``R[i, i]``, as ``[N]``."""
    return results[1:].diagonal()


def forgetting(results: Values) -> Values:
    """Return the loss of each task by later ones, ``F_i = R[i, i] - R[N, i]``, as ``[N]``; below 0 it has gained.

    The last task has 0, and the mean ``F`` is over all ``N`` tasks, as in Continual World (Wolczyk et al. 2021);
    others divide by ``N - 1``.
    """
    return learnt_performance(results) - final_performance(results)


def backward_transfer(results: Values) -> Values:
    """Return the gain of each task but the last by later ones, ``R[N, i] - R[i, i]``, as ``[N - 1]``.

    Its mean is GEM's BWT (Lopez-Paz and Ranzato 2017): ``-F N / (N - 1)``.
    """
    return -forgetting(results)[:-1]


def zero_shot_transfer(results: Values) -> Values:
    """Return the gain of tasks before they are learnt, ``R[i - 1, i] - R[0, i]`` for ``i > 1``, as ``[N - 1]``.

    Its mean is GEM's FWT (Lopez-Paz and Ranzato 2017).
    """
    return results.diagonal()[1:] - results[0, 1:]


def performance_throughout(results: Values) -> float | None:
    """Return the mean over all moments of the tasks learnt by then, ``mean over i >= j >= 1 of R[i, j]``.

    The accuracy of Diaz-Rodriguez et al. 2018; it sees a loss that later tasks make good again.
    """
    rows, columns = np.tril_indices(results.shape[1])
    return mean_or_none(results[1:][rows, columns])


def normalized_area(transitions: Sequence[float], success: Sequence[float | None]) -> float | None:
    """Return the area under a curve as a share of its window, by trapezoids, in [0, 1] for success in [0, 1].

        AUC = 1 / (t_K - t_1) * sum over k of  (t_k+1 - t_k) (p_k + p_k+1) / 2

    (Wolczyk et al. 2021.) A curve of one point, of a task on which nothing was trained, is level. None for no
    point, and where a success is None.

    Raises:
        ValueError: lengths differ, or ``transitions`` do not rise.
    """
    at, values = np.asarray(transitions, dtype=np.float64), np.asarray(success, dtype=np.float64)
    if at.shape != values.shape or at.ndim != 1:
        raise ValueError(f"a curve has {at.size} transitions and {values.size} successes")
    if (np.diff(at) <= 0).any():
        raise ValueError("the transitions of a curve do not rise")
    if len(at) < 2:
        return mean_or_none(values)
    if np.isnan(values).any():
        return None
    return float(np.trapezoid(values, at) / (at[-1] - at[0]))


def forward_transfer(area: float | None, reference_area: float | None) -> float | None:
    """Return the gain in learning speed over a task alone from scratch, as a share of the possible gain.

        FT_i = (AUC_i - AUC_i^b) / (1 - AUC_i^b)

    (Wolczyk et al. 2021), 1 at best and without a lower bound. None where an area is, and where the reference has
    an area of 1 and nothing can be gained.
    """
    if area is None or reference_area is None or np.isclose(reference_area, 1.0, rtol=0.0, atol=1e-9):
        return None
    return (area - reference_area) / (1.0 - reference_area)


def mean_or_none(values: npt.ArrayLike) -> float | None:
    """Return the mean; None of nothing, or where a value is missing (None or NaN)."""
    array = np.asarray(values, dtype=np.float64)
    return None if array.size == 0 or np.isnan(array).any() else float(array.mean())


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that there are; None of none."""
    return mean_or_none([value for value in values if value is not None])


def document_results(document: Document) -> tuple[str, Values]:
    """Return the measure of a document (``success``, or ``return`` where it has none), and ``[L + 1, K + L]``.

    The ``K = old_tasks`` columns of what the run began with come first, then those of the ``L`` tasks that it
    learnt.
    """
    success = document["success"]
    if success is not None:
        matrix = np.asarray(success, dtype=np.float64)
        if not np.isnan(matrix).all():
            return "success", matrix
    return "return", np.asarray(document["return"], dtype=np.float64)


def measures(document: Document, reference_document: Document | None = None) -> dict[str, Any]:
    """Return all measures of a run from its document (``summary.json``, see docs/continual.md).

    Tasks that the run began with count in ``old_change`` alone, ``mean over them of R[N, j] - R[0, j]``. Forward
    transfer needs the success curves of a reference, where tasks are found by :func:`original_name`; areas of
    several curves of one name are averaged. With all runs of a reference the mean of ``FT_i`` over runs is
    thus the ratio of means, as in Continual World. Its mean is over the tasks that have one. ``per_task`` has the
    learnt tasks in order. What cannot be known is None.

    Raises:
        ValueError: the shapes of results or curves do not fit the tasks.
    """
    name, matrix = document_results(document)
    old = int(document["old_tasks"])
    results = as_results(matrix[:, old:])
    learnt = document["tasks"][old:]
    if len(learnt) != results.shape[1] or len(learnt) != len(document["curves"]):
        raise ValueError(
            f"{len(learnt)} learnt tasks, {results.shape[1]} results, {len(document['curves'])} curves"
        )
    areas = _areas(document) if name == "success" else [None] * len(learnt)
    references = {} if reference_document is None else _areas_by_name(reference_document)
    alone = [references.get(original_name(task)) for task in learnt]
    transfers = [forward_transfer(area, other) for area, other in zip(areas, alone, strict=True)]
    zero_shot = [None, *zero_shot_transfer(results)]
    return {
        "measure": name,
        "performance": mean_or_none(final_performance(results)),
        "performance_throughout": performance_throughout(results),
        "forgetting": mean_or_none(forgetting(results)),
        "forward_transfer": mean_of_known(transfers),
        "backward_transfer": mean_or_none(backward_transfer(results)),
        "zero_shot_transfer": mean_or_none(zero_shot_transfer(results)),
        "old_change": mean_or_none(matrix[-1, :old] - matrix[0, :old]),
        "per_task": [
            {
                "task": task,
                "learnt": _known(learnt_performance(results)[index]),
                "performance": _known(final_performance(results)[index]),
                "forgetting": _known(forgetting(results)[index]),
                "zero_shot_transfer": _known(zero_shot[index]),
                "area": areas[index],
                "reference_area": alone[index],
                "forward_transfer": transfers[index],
            }
            for index, task in enumerate(learnt)
        ],
    }


def original_name(task: str) -> str:
    """Return the task that comes round again under this name: ``push (2)`` is a further ``push``."""
    return re.sub(r" \([0-9]+\)$", "", task)


def pooled_reference(documents: Sequence[Document]) -> Document:
    """Join several references as one, which has the learnt tasks and curves of all."""
    return {
        "tasks": [task for document in documents for task in document["tasks"][document["old_tasks"] :]],
        "old_tasks": 0,
        "curves": [curve for document in documents for curve in document["curves"]],
    }


def _areas(document: Document) -> list[float | None]:
    """Return one per learnt task; None where a curve has no success."""
    return [
        None if curve["success"] is None else normalized_area(curve["transitions"], curve["success"])
        for curve in document["curves"]
    ]


def _areas_by_name(document: Document) -> dict[str, float | None]:
    found: dict[str, list[float | None]] = {}
    for task, area in zip(document["tasks"][document["old_tasks"] :], _areas(document), strict=True):
        found.setdefault(original_name(task), []).append(area)
    return {task: mean_of_known(areas) for task, areas in found.items()}


def _known(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(value)
