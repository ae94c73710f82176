"""Probes of single tasks: runs of a tiny budget become curves, a table and a figure."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

import varshare_rl as vs
from experiments.probes.__main__ import BASE, main

TINY = (
    "env.horizon=10", "env.envs_per_task=2", "env.goals_per_task=2", "algorithm.rollout_transitions_per_task=40",
    "algorithm.minibatches=2", "algorithm.epochs=1", "network.hidden=[8]", "total_transitions=80",
    "evaluate.every=40", "evaluate.episodes=2", "observe.every=0", "log.trackers=[]", "log.quiet=true",
    "device=cpu",
)  # fmt: skip


def test_runs_become_curves_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = dict(word.split("=", 1) for word in (*BASE, *TINY))
    base = [f"{name}={value}" for name, value in plain.items()]
    vs.train(*base, "algorithm.entropy_weight=0.001", run_dir=str(tmp_path / "runs/a"))
    shutil.copytree(tmp_path / "runs/a", tmp_path / "runs/stopped")
    (tmp_path / "runs/stopped/summary.json").unlink()
    config = tmp_path / "runs/stopped/config.yaml"
    config.write_text(config.read_text().replace("\nseed: 0", "\nseed: 1"))
    folder = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["probes", str(tmp_path / "runs"), "--folder", str(folder)])
    capsys.readouterr()
    main()
    table = capsys.readouterr().out
    rows = list(csv.DictReader((folder / "curves.csv").read_text().splitlines()))
    logged = [json.loads(line) for line in (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()]
    name = "eval/pick-place-v3/return"
    expected = [(entry["transitions"], f"{entry[name]:.2f}") for entry in logged if name in entry]
    assert [at for at, _ in expected] == [0, 40, 80]
    for seed in "01":
        found = [(int(row["transitions"]), row["return"]) for row in rows if row["seed"] == seed and row["return"]]
        assert found == expected
    assert "algorithm.entropy_weight=0.001" in rows[0]["setting"]
    assert "algorithm.policy" not in rows[0]["setting"]
    assert table.count("| pick-place-v3 |") == 2
    figure = (folder / "probes.png").read_bytes()
    assert len(figure) > 5000
    monkeypatch.setattr(sys, "argv", ["probes", "--folder", str(folder)])
    main()  # from the table alone
    assert capsys.readouterr().out == table
    assert (folder / "probes.png").read_bytes() == figure
