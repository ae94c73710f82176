"""The table of methods holds the numbers of the runs."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from helpers import continual_document
from rich.console import Console

from varshare_rl.reporting.continual_measures import measures
from varshare_rl.reporting.continual_table import compare, group_labels, screen_tables, to_csv
from varshare_rl.reporting.statistics import mean_interval


def table(*documents: dict[str, Any], reference: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    labels = group_labels(documents, [{}] * len(documents))
    return compare(labels, documents, [measures(document, reference) for document in documents])


def test_means_intervals_and_costs_by_hand() -> None:
    runs = [
        continual_document("finetune", seed=1, learnt=0.6),
        continual_document("ewc", seed=0, lost=0.1, tasks=("a", "b", "c")),
        continual_document("finetune", seed=0, learnt=0.8),
    ]
    finetune, ewc = table(*runs, reference=continual_document(learnt=0.4, tasks=("a", "b", "c")))
    assert (finetune["label"], finetune["seeds"], ewc["label"], ewc["seeds"]) == ("finetune", [0, 1], "ewc", [0])
    # two tasks: 0.8 - 0.5 and 0.8 at the end; 0.6 - 0.5 and 0.6
    assert finetune["performance"]["runs"] == pytest.approx([0.55, 0.35])
    assert finetune["performance"]["mean"] == pytest.approx(0.45)
    interval = mean_interval([0.55, 0.35])
    assert (finetune["performance"]["low"], finetune["performance"]["high"]) == (interval.low, interval.high)
    assert finetune["forgetting"]["mean"] == pytest.approx(0.25)
    assert finetune["backward_transfer"]["mean"] == pytest.approx(-0.5)
    # areas 0.4 and 0.3 against 0.2
    assert finetune["forward_transfer"]["runs"] == pytest.approx([0.2 / 0.8, 0.1 / 0.8])
    assert finetune["seconds"]["mean"] == pytest.approx(10.5)
    assert (ewc["performance"]["low"], ewc["performance"]["high"]) == (None, None)
    assert ewc["trained_parameters"]["mean"] == pytest.approx((40 + 60) / 2)  # the first task's 900 do not count
    assert ewc["shared_bytes"]["mean"] == 3000
    assert ewc["bytes_per_task"]["mean"] == 100
    assert ewc["memory_bytes"]["mean"] == 50
    assert ewc["stored_bytes"]["mean"] == 3350
    assert ewc["old_change"] == {"mean": None, "low": None, "high": None, "runs": [None]}


def test_bytes_per_task_count_old_tasks_too_and_one_task_its_own_parameters() -> None:
    (row,) = table(continual_document(tasks=("a",), old=("x", "y", "z")))
    assert row["bytes_per_task"]["mean"] == 25
    assert row["trained_parameters"]["mean"] == 900
    assert row["old_change"]["mean"] == pytest.approx(-0.3)


def test_labels_say_what_sets_runs_of_a_method_apart() -> None:
    fresh = {"critic": "fresh", "optimizer": False, "replay": True}
    documents = [
        continual_document("ewc"),
        continual_document("ewc", carried=fresh),
        continual_document("finetune", task_ids="hidden"),  # alone of its method: no need to say so
        continual_document("copies", old=("x",)),
    ]
    options = [{"method.weight": "1"}, {"method.weight": "1"}, {"method.weight": "3"}, {}]
    assert group_labels(documents, options) == [
        "ewc old_tasks=0 carry.critic=finetune carry.replay=false",
        "ewc old_tasks=0 carry.critic=fresh carry.replay=true",
        "finetune old_tasks=0",
        "copies old_tasks=1",
    ]
    options[1] = {"method.weight": "100"}
    assert group_labels(documents, options)[1].endswith("carry.replay=true method.weight=100")
    same = [continual_document("ewc", seed=seed) for seed in range(2)]
    assert group_labels(same, [{}, {}]) == ["ewc", "ewc"]


def test_csv_can_be_read_back() -> None:
    rows = table(continual_document(seed=0), continual_document(seed=1, learnt=0.6), continual_document("ewc"))
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [line["label"] for line in read] == ["finetune", "ewc"]
    assert [line["runs"] for line in read] == ["2", "1"]
    for line, row in zip(read, rows, strict=True):
        for name in ("performance", "forgetting", "stored_bytes", "zero_shot_transfer", "forward_transfer"):
            for end in ("mean", "low", "high"):
                text = line[name if end == "mean" else f"{name}_{end}"]
                assert (float(text) if text else None) == pytest.approx(row[name][end])


def test_screen_leaves_out_what_nobody_has() -> None:
    rows = table(continual_document(seed=0), continual_document(seed=1, learnt=0.6))
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(*screen_tables(rows, "success"))
    shown = console.export_text()
    assert "0.45" in shown
    assert "0.35..0.55" in shown
    assert "BWT" in shown
    assert "FT" not in shown
    assert "old tasks" not in shown.replace("change of old tasks", "")
    assert "3,250" in shown  # bytes in all
