"""Continual runs are read whole or refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import continual_document, write_continual

from varshare_rl.errors import UserError
from varshare_rl.reporting.continual_measures import measures, pooled_reference
from varshare_rl.reporting.continual_runs import (
    ContinualRun,
    check_comparable,
    check_references,
    read_continual_runs,
)


def run(name: str = "run", **changes: Any) -> ContinualRun:
    return ContinualRun(Path(name), continual_document(**changes), {})


def test_folders_of_runs_and_of_sweeps_each_run_once(tmp_path: Path) -> None:
    for seed in range(3):
        write_continual(tmp_path / "sweep" / f"s{seed}", continual_document(seed=seed))
    (tmp_path / "sweep" / "unfinished").mkdir()
    (tmp_path / "sweep" / "multirun.yaml").write_text("hydra: {}")
    alone = write_continual(tmp_path / "alone", continual_document("ewc"))
    sweep = tmp_path / "sweep"
    given = [
        str(path) for path in (sweep / "s1", sweep, sweep / "multirun.yaml", alone, sweep / "s1" / ".." / "s1")
    ]
    found = read_continual_runs(given)
    assert [entry.folder.name for entry in found] == ["s1", "s0", "s2", "alone"]
    assert [entry.seed for entry in found] == [1, 0, 2, 0]
    assert found[0].learnt == ["a", "b"]
    assert found[0].budgets == [1000, 1000]


def test_options_that_tell_runs_apart(tmp_path: Path) -> None:
    config = "seed: 3\nmethod: {name: ewc, weight: 10.0}\nnetwork:\n  hidden: [8, 8]\nlog: {every: 5}\n"
    folder = write_continual(tmp_path / "run", continual_document(), config)
    (found,) = read_continual_runs([str(folder)])
    assert found.config == {"method.name": "ewc", "method.weight": "10.0", "network.hidden": "[8, 8]"}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in continual_document().items() if key != name}


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"mean_success": 1.0}, "is no continual run"),
        ([], "is no continual run"),
        (continual_document(format="single"), "is no continual run"),
        (without("curves"), "cannot read .*curves"),
        (without("carried"), "cannot read .*carried"),
        (without("success"), "cannot read .*success"),
        (continual_document(success=[[0.1, 0.1]]), "cannot read"),
        (continual_document(success=[[0.1], [0.2, 0.3]]), "cannot read"),
        (continual_document(**{"return": [[1.0, 2.0]]}), r"cannot read .*return of the shape \[1, 2\]"),
        (continual_document(per_task=[]), "cannot read .*0 entries for 2"),
        (continual_document(seconds="long"), "cannot read .*no numbers"),
        (continual_document(method=None), "cannot read .*no text"),
        (continual_document(conditions={}), "cannot read .*seed"),
        (continual_document(old_tasks=1), "cannot read"),
    ],
)
def test_what_is_no_continual_run(tmp_path: Path, document: Any, named: str) -> None:
    folder = write_continual(tmp_path / "run", document)
    with pytest.raises(UserError, match=named):
        read_continual_runs([str(folder)])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere holds no finished continual run: there is no summary.json"):
        read_continual_runs([str(tmp_path / "nowhere")])
    folder = write_continual(tmp_path / "run", continual_document())
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*summary.json"):
        read_continual_runs([str(folder)])
    write_continual(folder, continual_document(), config="a: [")
    with pytest.raises(UserError, match=r"cannot read .*config.yaml"):
        read_continual_runs([str(folder)])


def budget(*transitions: int) -> list[dict[str, Any]]:
    entries = continual_document()["per_task"]
    return [{**entry, "transitions": spent} for entry, spent in zip(entries, transitions, strict=True)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"suite": "metaworld"}, "one and other differ in suite: pointmass and metaworld; report them apart"),
        ({"algorithm": "ppo"}, "differ in algorithm: sac and ppo"),
        ({"measure": "return"}, "differ in measure"),
        ({"tasks": ("b", "a")}, "differ in tasks: a,b and b,a"),
        ({"tasks": ("a", "b", "c")}, "differ in tasks"),
        ({"conditions": {"seed": 1, "horizon": 150}}, "differ in horizon: 200 and 150"),
        ({"per_task": budget(1000, 2000)}, "differ in transitions of b: 1000 and 2000"),
    ],
)
def test_runs_that_cannot_be_compared(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_comparable([run("one"), run("other", **{"seed": 1, **changes})], ["ewc", "finetune"])


def test_runs_that_can() -> None:
    """Whole steps of many environments, tasks known before, and methods that train nothing."""
    others = [
        run(seed=1, per_task=budget(1009, 1000)),
        run(seed=2, old=("x",)),
        run(seed=3, per_task=budget(1000, 0)),
        run(seed=4, seconds=99.0),
    ]
    check_comparable([run(), *others], ["finetune"] * 5)


def test_two_runs_of_one_method_and_seed() -> None:
    with pytest.raises(UserError, match="one and two are both ewc with seed 0; leave one out"):
        check_comparable([run("one"), run("two")], ["ewc", "ewc"])
    check_comparable([run("one"), run("two")], ["ewc weight=1", "ewc weight=2"])


@pytest.mark.parametrize(
    ("runs", "references", "named"),
    [
        ([run()], [run("other", tasks=("a",))], "the reference lacks b, a task of run"),
        ([run()], [run("other", suite="metaworld")], "differ in suite"),
        ([run()], [run("other", per_task=budget(500, 1000))], "differ in transitions of a: 1000 and 500"),
        (
            [run(success=None, measure="return")],
            [run("other", success=None, measure="return")],
            "run has no success",
        ),
    ],
)
def test_references_that_say_nothing(runs: list[ContinualRun], references: list[ContinualRun], named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_references(runs, references)


def test_references_may_have_a_task_each_and_tasks_may_come_round_again() -> None:
    """The areas of 0.4 are measured against 0.1 for a and 0.2 for b, whichever round it is."""
    again = run(tasks=("a", "b", "a (2)", "b (2)"))
    references = [run(tasks=("a",), learnt=0.2), run(tasks=("b",), learnt=0.4)]
    check_references([again], references)
    found = measures(again.document, pooled_reference([reference.document for reference in references]))
    transfers = [entry["forward_transfer"] for entry in found["per_task"]]
    assert transfers == pytest.approx([0.3 / 0.9, 0.2 / 0.8] * 2)
