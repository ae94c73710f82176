"""Runs until a threshold become a table and a figure, and are not made twice."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from experiments.time_to_success import __main__ as experiment

TINY = (
    "env.envs_per_task=2", "env.horizon=10", "env.goals_per_task=2", "network.hidden=[8]",
    "algorithm.rollout_transitions_per_task=40", "algorithm.minibatches=2", "algorithm.epochs=1",
    "total_transitions=320", "evaluate.every=160", "observe.every=0", "log.trackers=[]", "device=cpu",
)  # fmt: skip


def test_runs_become_a_table_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiment, "THRESHOLDS", (0.0, 0.97))
    monkeypatch.setattr(experiment.os, "nice", lambda by: 0)
    words = ["time", *TINY, "--ways", "PPO, shared", "--runs", str(tmp_path / "runs"), "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    columns = ("tasks", "way", "seed", "transitions_0", "seconds_0", "transitions_0.97", "seconds_0.97")
    monkeypatch.setattr(experiment, "COLUMNS", (*columns, "transitions", "seconds", "best_success", "git_commit"))
    experiment.main()
    (row,) = csv.DictReader((tmp_path / "times.csv").read_text().splitlines())
    assert (row["transitions_0"], row["transitions_0.97"], row["transitions"]) == ("0", "", "320")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    assert "| four | PPO, shared | 0 | 0 min, 0 | - |" in capsys.readouterr().out
    before = (tmp_path / "runs" / "four_PPO_shared_0" / "metrics.jsonl").read_bytes()
    experiment.main()
    assert (tmp_path / "runs" / "four_PPO_shared_0" / "metrics.jsonl").read_bytes() == before


def test_a_run_ends_at_the_last_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "THRESHOLDS", (-1.0,))
    overrides = [*experiment.LISTS["four"][:2], *experiment.WAYS["PPO, shared"], *TINY]
    plain = dict(word.split("=", 1) for word in overrides)
    experiment.train(tmp_path / "run", [f"{key}={value}" for key, value in plain.items()])
    assert [at for at, _, _ in experiment.curve(tmp_path / "run")] == [0]


def test_given_runs_are_joined_and_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """0.5 is reached by the first run, 0.9 by the one that goes on from its 200 transitions, at its own seconds."""
    curves = {
        "a": [(0, 1.0, 0.0), (100, 60.0, 0.6), (200, 120.0, 0.7), (300, 180.0, 0.99)],
        "b": [(200, 121.0, 0.7), (300, 240.0, 0.95)],
    }
    for name, points in curves.items():
        (tmp_path / name).mkdir()
        lines = [
            {"transitions": at, "seconds": seconds, "eval/mean_success": success} for at, seconds, success in points
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = {"conditions": {"git_commit": name * 7, "suite": "mt10", "seed": 3}}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    words = ["time", "--given", f"joined={tmp_path / 'a'}+{tmp_path / 'b'}", f"alone={tmp_path / 'a'}"]
    monkeypatch.setattr(sys, "argv", [*words, "--folder", str(tmp_path)])
    experiment.main()
    shown = capsys.readouterr().out
    assert "| mt10 | joined | 3 | 1 min, 100 | 4 min, 300 | 4 min, 300 | - | 0.95 after 300 |" in shown
    assert "| mt10 | alone | 3 | 1 min, 100 | 3 min, 300 | 3 min, 300 | 3 min, 300 | 0.99 after 300 |" in shown
    first, _ = csv.DictReader((tmp_path / "times.csv").read_text().splitlines())
    assert (first["git_commit"], first["seconds_0.9"]) == ("b" * 7, "240.0")
