"""Figures of many groups and many tasks can be read, and tell all of them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from figure_checks import assert_nothing_overlaps

from varshare_rl.reporting.comparison import Section, compare_runs
from varshare_rl.reporting.comparison_figures import comparison_figures, group_looks
from varshare_rl.reporting.figures import to_file
from varshare_rl.reporting.run_records import Curves, RunRecord
from varshare_rl.reporting.style import PAGE, look


def record(network: str, seed: int, tasks: int) -> RunRecord:
    draw = np.random.default_rng([seed, len(network), tasks])
    at = np.linspace(1e6, 2e7, 12)
    final = draw.random(tasks)
    values = dict.fromkeys(("success", "success_final", "return"), final * (at / at[-1])[:, None])
    return RunRecord(
        folder=Path(network),
        options={"env.name": "metaworld", "network.name": network, "seed": seed, "evaluate.episodes": 5,
                 "total_transitions": 20_000_000},
        tasks=tuple(f"some-task-with-a-name-v3-{index}" for index in range(tasks)),
        curves=Curves(at, at / 5000, values),
        scores=dict.fromkeys(values, final),
        conditions={"suite": "MT50"},
        parameters={"stored": 10_000 * len(network), "active_per_task": 7000, "shared": 1, "per_task": 1},
        transitions=20_000_000,
        seconds=4000.0,
        nats=draw.random(tasks) * 300,
        sharing=0.9,
    )  # fmt: skip


def section(networks: int, tasks: int, seeds: int = 3) -> Section:
    runs = [record(f"network_{'x' * place}", seed, tasks) for place in range(networks) for seed in range(seeds)]
    (made,) = compare_runs(runs)
    return made


@pytest.mark.parametrize(
    ("networks", "tasks"),
    [(2, 1), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((3, 8), (13, 10), (13, 50)))],
)
def test_nothing_overlaps_at_the_width_of_a_page(networks: int, tasks: int) -> None:
    made = section(networks, tasks)
    for name, figure in comparison_figures(made, group_looks([made])).items():
        assert figure.get_figwidth() <= PAGE, name
        assert_nothing_overlaps(figure)


def test_the_looks_of_all_methods_and_of_fifty_tasks_differ() -> None:
    assert len({look(index)[:2] for index in range(56)}) == 56
    for index in range(55):
        assert all(one != other for one, other in zip(look(index), look(index + 1), strict=True))


def test_a_group_looks_the_same_in_every_section() -> None:
    one, other = section(3, 2), section(2, 4)
    looks = group_looks([one, other])
    assert looks == group_looks([one])
    assert set(looks) == {"network_", "network_x", "network_xx"}


def test_files_are_the_same_for_the_same_figure_and_a_pdf_has_no_title() -> None:
    made = section(2, 2)
    figure = comparison_figures(made, group_looks([made]))["profiles"]
    assert to_file(figure, "svg") == to_file(figure, "svg")
    svg = to_file(figure, "svg").decode()
    assert "performance profiles" in svg
    pdf = to_file(figure, "pdf")
    assert pdf.startswith(b"%PDF")
    assert pdf == to_file(figure, "pdf")
    assert figure.get_suptitle() == "MT50: performance profiles"
