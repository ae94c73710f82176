"""Runs become tables: one option changed at a time, and what posteriors are good for."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from conftest import Command
from helpers import TINY, TINY_ALGORITHM

from experiments.defaults import __main__ as defaults
from experiments.posterior_uses import __main__ as uses

RUN = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=640", "evaluate.every=320", "log.trackers=[]")


def test_runs_become_tables(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in {"a": (), "b": ("elbo.networks=actor",), "c": ("network=shared",)}.items():
        outcome = command("train", *RUN, *options, f"run_dir=runs/{name}")
        assert outcome.code == 0, outcome.err
    monkeypatch.setattr(sys, "argv", ["defaults", "runs", "--folder", "."])
    defaults.main()
    rows = {row["changed"]: row for row in csv.DictReader(Path("defaults.csv").read_text().splitlines())}
    assert list(rows) == [
        "elbo.networks=actor",
        "network.name=shared",
        "the defaults",
    ]  # not what all have in common
    assert float(rows["the defaults"]["nats"]) > 0.0 == float(rows["network.name=shared"]["nats"])
    assert "| `elbo.networks=actor` | 1 | " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["uses", "runs", "--folder", ".", "--episodes", "2"])
    uses.main()
    found = list(csv.DictReader(Path("uses.csv").read_text().splitlines()))
    assert len(found) == 2  # a shared network has no posterior
    kept = [float(found[0][f"kept_{threshold:g}"]) for threshold in uses.THRESHOLDS]
    assert kept == sorted(kept, reverse=True)
    assert "| pointmass | 0.1 | 2 | " in capsys.readouterr().out
