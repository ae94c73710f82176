"""MT10's settings: runs of a tiny budget become a table by what they change."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

import varshare_rl as vs
from experiments.mt10 import joined, spreads
from experiments.mt10.__main__ import TASKS, main

TINY = (
    "env.horizon=4", "env.envs_per_task=2", "env.goals_per_task=2", "env.workers=1",
    "algorithm.rollout_transitions_per_task=8", "algorithm.minibatches=1", "algorithm.epochs=1",
    "network.hidden=[8]", "total_transitions=80", "evaluate.every=80", "evaluate.episodes=2", "observe.every=0",
    "log.trackers=[]", "log.quiet=true", "device=cpu",
)  # fmt: skip


def test_runs_become_a_table_of_what_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("a", ()), ("b", ("algorithm.clip=0.1",)), ("c", ("algorithm.clip=0.1", "seed=1"))):
        words = dict(word.split("=", 1) for word in (*TINY, *more))
        vs.train("mt10", *(f"{key}={value}" for key, value in words.items()), run_dir=str(tmp_path / "runs" / name))
    monkeypatch.setattr(sys, "argv", ["mt10", str(tmp_path / "runs"), "--folder", str(tmp_path)])
    capsys.readouterr()
    main()
    lines = capsys.readouterr().out.splitlines()
    assert sum("`algorithm.clip=0.1` | 2 |" in line for line in lines) == 1
    assert sum("`env=mt10` | 1 |" in line for line in lines) == 1
    rows = list(csv.DictReader((tmp_path / "settings.csv").read_text().splitlines()))
    assert [(row["setting"], row["seed"], row["transitions"]) for row in rows] == [
        ("algorithm.clip=0.1", "0", "80"), ("algorithm.clip=0.1", "1", "80"), ("env=mt10", "0", "80"),
    ]  # fmt: skip
    last = json.loads((tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()[-1])
    for task in TASKS:
        assert float(rows[-1][task]) == pytest.approx(last[f"eval/{task}/return"], abs=0.05)


@pytest.mark.parametrize(("most", "share"), [(5.0, 0.0), (-5.0, 1.0)])
def test_spreads_at_their_bound_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: float, share: float
) -> None:
    words = dict(word.split("=", 1) for word in (*TINY, f"algorithm.max_log_std={most}"))
    vs.train("mt10", *(f"{key}={value}" for key, value in words.items()), run_dir=str(tmp_path / "run"))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "run"), "--steps", "3", "--folder", str(tmp_path)])
    spreads.main()
    (row,) = csv.DictReader((tmp_path / "spreads.csv").read_text().splitlines())
    assert (row["run"], row["transitions"]) == ("run", "80")
    assert [float(row[task]) for task in TASKS] == [share] * 10


def test_runs_that_go_on_from_one_another_become_one_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in TINY).items()]
    first, second = tmp_path / "first", tmp_path / "second"
    vs.train("mt10", *words, run_dir=str(first))
    vs.train(f"from={first}", "total_transitions=160", run_dir=str(second))
    monkeypatch.setattr(sys, "argv", ["", str(first), str(second), "--folder", str(tmp_path)])
    joined.main()
    rows = list(csv.DictReader((tmp_path / "joined.csv").read_text().splitlines()))
    assert [(row["run"], row["transitions"]) for row in rows] == [
        ("first", "0"),
        ("second", "80"),
        ("second", "160"),
    ]
    last = json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(rows[-1]["push-v3_return"]) == pytest.approx(last["eval/push-v3/return"], abs=0.01)
    assert (tmp_path / "joined.png").stat().st_size > 1000
