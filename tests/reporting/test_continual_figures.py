"""The figures show the numbers of the documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from figure_checks import assert_nothing_overlaps
from helpers import continual_document
from matplotlib.figure import Figure

from varshare_rl.reporting.continual_figures import comparison_figures, run_figures
from varshare_rl.reporting.continual_measures import measures
from varshare_rl.reporting.continual_table import compare, group_labels
from varshare_rl.reporting.figures import to_file
from varshare_rl.reporting.style import PAGE, look


def rows(*documents: dict[str, Any], reference: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    labels = group_labels(documents, [{}] * len(documents))
    return compare(labels, documents, [measures(document, reference) for document in documents])


def comparison(made: list[dict[str, Any]], *documents: dict[str, Any]) -> dict[str, Figure]:
    return comparison_figures(made, "success", group_labels(documents, [{}] * len(documents)), documents)


@pytest.mark.parametrize(
    "document",
    [
        continual_document(),
        continual_document(old=("x", "y")),
        pytest.param(continual_document(tasks=[f"task {index}" for index in range(20)]), marks=pytest.mark.slow),
        continual_document(tasks=("a",)),
        continual_document(success=None, measure="return"),
        continual_document(success=[[None, None], [0.8, None], [0.3, 0.8]]),
    ],
    ids=["plain", "old", "many", "one", "return", "unknown"],
)
def test_every_run_has_its_figures(document: dict[str, Any]) -> None:
    figures = run_figures(document)
    assert set(figures) == {"matrix", "tasks"}
    for figure in figures.values():
        assert to_file(figure, dpi=40).startswith(b"\x89PNG")


def test_the_matrix_has_the_numbers_and_frames_what_was_just_learnt() -> None:
    document = continual_document(tasks=("a", "b", "c"), old=("x",))
    axes = run_figures(document)["matrix"].axes[0]
    shown = axes.images[0].get_array()
    assert shown is not None
    np.testing.assert_allclose(shown, document["success"])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "a", "b", "c"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["(nothing)", "a", "b", "c"]
    assert {text.get_text() for text in axes.texts} >= {"0.10", "0.80", "0.90", "0.60"}
    framed = [(round(frame.get_x() + 0.5), round(frame.get_y() + 0.5)) for frame in axes.patches]
    assert framed == [(1, 1), (2, 2), (3, 3)]  # columns and rows


def test_the_lines_are_the_columns_in_a_panel_of_their_own() -> None:
    document = continual_document(tasks=("a", "b", "c"), old=("x",))
    figure = run_figures(document)["tasks"]
    by_title = {axes.get_title(): [np.asarray(line.get_ydata()) for line in axes.lines] for axes in figure.axes}
    columns = np.array(document["success"])
    np.testing.assert_allclose(by_title["x (old)"][1], columns[:, 0])
    before, after, dot = by_title["2 b"]
    np.testing.assert_allclose(before, columns[:3, 2])
    np.testing.assert_allclose(after, columns[2:, 2])
    assert dot.tolist() == [columns[2, 2]]
    means = [columns[1, 1], columns[2, 1:3].mean(), columns[3, 1:].mean()]
    np.testing.assert_allclose(by_title["mean of those learnt"][0], means)
    assert "finetune on pointmass, seed 0" in figure.get_suptitle()


def test_twenty_tasks_fit_on_a_page() -> None:
    tasks = [f"a-task-with-a-long-name-{index}" for index in range(20)]
    figure = run_figures(continual_document(tasks=tasks))["tasks"]
    assert figure.get_figwidth() <= PAGE
    assert_nothing_overlaps(figure)


def test_the_comparison_has_a_panel_per_measure_and_a_point_per_method() -> None:
    documents = [continual_document(seed=seed, learnt=0.7 + 0.1 * seed) for seed in range(2)]
    documents.append(continual_document("ewc", lost=0.1))
    made = rows(*documents, reference=continual_document(learnt=0.4))
    figures = comparison(made, *documents)
    assert set(figures) == {"measures", "bytes", "learning"}
    panels = figures["measures"].axes
    assert [axes.get_xlabel() for axes in panels] == ["performance P", "forgetting F", "forward transfer FT"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["finetune", "ewc"]
    drawn = [np.asarray(line.get_xdata()).tolist() for line in panels[0].lines]
    finetune = made[0]["performance"]
    assert [finetune["low"], finetune["high"]] in drawn
    assert [finetune["mean"]] in drawn
    assert finetune["runs"] in drawn
    (legend,) = figures["bytes"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["finetune", "ewc"]
    points = [np.asarray(line.get_xydata()).tolist() for line in figures["bytes"].axes[0].lines]
    assert [[3250.0, made[1]["performance"]["mean"]]] in points
    for figure in figures.values():
        assert figure.get_figwidth() <= PAGE
        assert to_file(figure, dpi=40).startswith(b"\x89PNG")


def test_methods_beyond_the_colours_are_told_apart_by_their_markers() -> None:
    documents = [continual_document(f"method {index}") for index in range(13)]
    figures = comparison(rows(*documents), *documents)
    lines = figures["bytes"].axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 13
    dashes = {(line.get_color(), str(vars(line)["_dash_pattern"])) for line in figures["learning"].axes[0].lines}
    assert len(dashes) == 13
    assert_nothing_overlaps(figures["learning"])


def test_learning_is_a_panel_per_task_with_the_mean_of_all_seeds() -> None:
    documents = [continual_document(seed=seed, learnt=0.4 + 0.4 * seed, old=("x",)) for seed in range(2)]
    frozen = continual_document("frozen", old=("x",))
    frozen["curves"] = [{"transitions": [0.0], "success": [0.1]}] * 2
    panels = comparison(rows(*documents, frozen), *documents, frozen)["learning"].axes
    assert [axes.get_title() for axes in panels] == ["a", "b"]
    (legend,) = panels[0].figure.legends  # type: ignore[union-attr]
    assert [text.get_text() for text in legend.get_texts()] == ["finetune (40)", "frozen (40)"]
    finetune, alone = panels[0].lines
    np.testing.assert_allclose(finetune.get_ydata(), [0.0, 0.3, 0.6])
    assert len(np.asarray(alone.get_xdata())) == 1
    assert alone.get_marker() == look(1).marker
    (band,) = panels[0].collections  # of two runs: from the one to the other
    ends = band.get_paths()[0].get_extents()
    assert (ends.y0, ends.y1) == (0.0, 0.8)


def test_curves_of_other_points_are_joined() -> None:
    one, other = continual_document(seed=0), continual_document(seed=1)
    other["curves"] = [{"transitions": [0.0, 1000.0], "success": [0.0, 1.0]}] * 2
    (mean,) = comparison(rows(one, other), one, other)["learning"].axes[0].lines
    np.testing.assert_allclose(mean.get_xdata(), [0.0, 500.0, 1000.0])
    np.testing.assert_allclose(mean.get_ydata(), [0.0, 0.45, 0.9])
