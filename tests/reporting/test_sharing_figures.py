"""The figures show the numbers of the document."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from varshare_rl.nn import IndependentConfig, Posterior, SharedConfig, VarShareConfig, VarShareLoRAConfig
from varshare_rl.reporting.figures import to_file
from varshare_rl.reporting.sharing_figures import sharing_figures
from varshare_rl.reporting.style import short_names
from varshare_rl.run.sharing import Conflict, sharing_document

ALL = {"nats", "similarity", "distance", "layers", "posteriors", "conflict"}


def document(option: Any, tasks: int = 3, trained: bool = True) -> dict[str, Any]:
    network = option.build(4, 2, tasks, Posterior())
    if trained:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    vectors = torch.randn(tasks, 5, dtype=torch.float64)
    conflict = Conflict(900, {"actor": vectors @ vectors.t()})
    names = [f"task {index}" for index in range(tasks)]
    return sharing_document({"actor": network}, names, 1000, conflict)


@pytest.mark.parametrize(
    ("option", "tasks", "trained", "expected"),
    [
        (VarShareLoRAConfig(hidden=[6]), 3, True, ALL),
        pytest.param(VarShareLoRAConfig(hidden=[6]), 20, True, ALL, marks=pytest.mark.slow),
        (VarShareLoRAConfig(hidden=[6]), 3, False, ALL),
        (VarShareLoRAConfig(hidden=[6]), 1, True, ALL),
        (VarShareConfig(hidden=[6]), 3, True, ALL),
        (IndependentConfig(hidden=[6]), 3, True, ALL - {"nats"}),
        (SharedConfig(hidden=[6]), 3, True, {"conflict"}),
    ],
    ids=["lora", "many_tasks", "fresh", "one_task", "full_rank", "independent", "shared"],
)
def test_every_document_has_its_figures(option: Any, tasks: int, trained: bool, expected: set[str]) -> None:
    figures = sharing_figures(document(option, tasks, trained))
    assert set(figures) == expected
    if tasks != 3 or not trained or expected != ALL:  # drawing takes a second, and these have nothing new
        for figure in figures.values():
            assert to_file(figure, dpi=40).startswith(b"\x89PNG")


def test_a_figure_shows_the_numbers_and_names() -> None:
    made = document(VarShareLoRAConfig(hidden=[6]))
    figures = sharing_figures(made)
    shown = figures["nats"].axes[1].images[0].get_array()
    assert shown is not None
    np.testing.assert_allclose(shown, [layer["nats"] for layer in made["layers"]])
    axes = figures["distance"].axes[1]
    order = made["clusters"]["order"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"task {task}" for task in order]
    shown = axes.images[0].get_array()
    assert shown is not None
    np.testing.assert_allclose(shown, np.array(made["distance"])[np.ix_(order, order)])
    assert figures["distance"].get_suptitle().endswith("at 1,000 transitions")
    assert figures["conflict"].get_suptitle().endswith("at 900 transitions")


def test_the_first_leaf_of_the_tree_stands_beside_the_first_row() -> None:
    made = document(VarShareLoRAConfig(hidden=[6]), tasks=6)
    tree, heat = sharing_figures(made)["distance"].axes[:2]
    assert tree.get_ylim() == (60.0, 0.0)  # leaves at 5, 15, ..., the first at the top
    assert heat.get_ylim() == (5.5, -0.5)


def test_short_names() -> None:
    names = ["actor.network.layers.0", "critic.networks.1.layers.2"]
    assert short_names(names) == ["actor 0", "critic 1 2"]
