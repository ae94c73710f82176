"""The comparison of architectures reads runs as they are, and its settings give what they promise."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from experiments.architectures.__main__ import main
from experiments.architectures.grid import NETWORKS, configuration
from experiments.architectures.results import interval, read_times
from experiments.architectures.timing import CONTENDERS
from experiments.bench.contenders import Setting
from varshare_rl.assemble import build_algorithm, build_suite, parameter_count
from varshare_rl.registry import registered


def finished(folder: Path, network: str, seed: int, tasks: Mapping[str, float], transitions: int = 100) -> None:
    """A run folder as far as the reader looks."""
    folder.mkdir(parents=True)
    config = configuration("pointmass", network, f"seed={seed}", "network.hidden=[7,7]")
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    summary = {
        "mean_success": sum(tasks.values()) / len(tasks),
        "mean_return": -3.0,
        "tasks": {name: {"success": success} for name, success in tasks.items()},
        "transitions": transitions,
        "seconds": 12.4,
        "parameters": {"stored": 3000, "active_per_task": 1000},
        "conditions": {"git_commit": "abc"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(name="sweep")
def make_sweep(tmp_path: Path) -> Path:
    sweep = tmp_path / "sweep"
    finished(sweep / "a", "varshare_lora", 0, {"up": 1.0, "down": 0.5})
    finished(sweep / "b", "varshare_lora", 1, {"up": 0.5, "down": 0.75})
    finished(sweep / "c", "shared", 0, {"up": 0.25, "down": 0.25})
    (sweep / "unfinished").mkdir()
    return sweep


def test_runs_become_rows_a_table_and_a_figure(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    ratio = {
        "name": "pointmass varshare_lora",
        "against": "pointmass shared",
        "median": 1.5,
        "low": 1.4,
        "high": 1.6,
    }
    (folder / "times.json").write_text(json.dumps({"sections": [{"ratios": [ratio]}]}))
    main([str(sweep), "--folder", str(folder)])
    with (folder / "architectures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["network"], row["seed"], row["success"]) for row in rows] == [
        ("shared", "0", "0.25"), ("varshare_lora", "0", "0.75"), ("varshare_lora", "1", "0.625"),
    ]  # fmt: skip
    kept = {name: rows[1][name] for name in ("suite", "per_task", "hidden", "stored", "active", "transitions")}
    assert kept == {
        "suite": "pointmass", "per_task": "up=1 down=0.5", "hidden": "7x7", "stored": "3000", "active": "1000",
        "transitions": "100",
    }  # fmt: skip
    assert rows[1]["git_commit"] == "abc"
    shown = capsys.readouterr().out
    assert (
        "| `shared` | 1 | 0.250 (0.250 to 0.250) | 0.25 down | 7x7 | 1,000 | 3,000 | 1.00 (1.00 to 1.00) |" in shown
    )
    assert (  # the hardest task is the one with the least mean: up 0.75, down 0.625
        "| `varshare_lora` | 2 | 0.688 (0.625 to 0.750) | 0.62 down | 7x7 | 1,000 | 3,000 | 1.50 (1.40 to 1.60) |"
        in shown
    )
    assert (folder / "architectures.png").stat().st_size > 0


def test_what_cannot_be_compared_is_refused(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*sweeps: Path) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, sweeps), "--folder", str(tmp_path / "out")])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "no finished run in these folders" in refused(tmp_path / "nothing")
    finished(tmp_path / "again" / "d", "shared", 0, {"up": 1.0})
    assert "are both suite pointmass, network shared, seed 0" in refused(sweep, tmp_path / "again")
    finished(tmp_path / "longer" / "d", "shared", 3, {"up": 1.0}, transitions=500)
    assert "runs of pointmass have 100 to 500 transitions" in refused(sweep, tmp_path / "longer")
    assert not (tmp_path / "out").exists()


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = interval(list(generator.normal(0.0, 1.0, 40)))
        covered += low < 0.0 < high
    assert 0.90 <= covered / 200 <= 0.98


def test_no_times_where_none_were_measured(tmp_path: Path) -> None:
    assert read_times(tmp_path / "times.json") == {}


def test_the_grid_has_every_architecture() -> None:
    assert sorted(NETWORKS) == sorted(registered("network"))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_architecture_has_the_capacity_of_the_grid(network: str) -> None:
    config = configuration("pointmass", network)
    suite = build_suite(config)
    algorithm = build_algorithm(config, suite, torch.device("cpu"))
    assert parameter_count(algorithm, len(suite.task_names)).active_per_task == pytest.approx(12400, rel=0.02)


def test_an_update_is_timed() -> None:
    assert CONTENDERS["pointmass varshare_lora"](Setting(quick=True))() > 0.0
