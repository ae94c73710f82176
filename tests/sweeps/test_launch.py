"""Runs side by side: they share the cores, and one signal stops them all."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM
from omegaconf import OmegaConf

from varshare_rl.cli import terminable
from varshare_rl.errors import Terminated, missing_extra
from varshare_rl.sweeps import launch
from varshare_rl.sweeps.launch import STOP_FILE, _cap, _heeding, _passing_on

RUN = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=160")


@pytest.mark.parametrize(("threads", "computing", "workers"), [(2, 2, 2), (1, 1, 1), (4, 3, 0), (None, 3, 0)])
def test_a_run_takes_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, computing: int, workers: int
) -> None:
    monkeypatch.setattr(launch, "physical_cores", lambda: 4)
    before = torch.get_num_threads()
    composed = OmegaConf.create({"env": {"workers": 0}})
    try:
        torch.set_num_threads(3)
        _cap(composed, threads)
        assert torch.get_num_threads() == computing
    finally:
        torch.set_num_threads(before)
    assert composed.env.workers == workers
    given = OmegaConf.create({"env": {"workers": 3}})
    _cap(given, None)
    assert given.env.workers == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_reaches_every_process_once(tmp_path: Path, number: signal.Signals) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
    stop = tmp_path / STOP_FILE
    before = signal.getsignal(number)
    with _passing_on(stop) as received:
        os.kill(os.getpid(), number)
        assert received == [number]
        assert signal.getsignal(number) is before  # a second one acts at once
    other = signal.SIGTERM if number is signal.SIGINT else signal.SIGINT
    assert stop.read_text() == str(int(other))
    with pytest.raises((Terminated, KeyboardInterrupt)), terminable(), _heeding(stop):
        time.sleep(20)
    with _passing_on(stop):
        assert not stop.exists()


def test_a_launcher_that_is_not_installed_names_its_extra(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    for name in launch.EXTRA:
        outcome = command("train", "-m", *RUN, "seed=0,1", f"hydra/launcher={name}")
        assert outcome.code == 2
        expected = missing_extra(f"hydra/launcher={name} needs its Hydra plugin", "sweeps")
        assert outcome.err == f"error: {expected}\n"
    assert list(folder.rglob("*")) == []


@pytest.mark.slow
def test_joblib_makes_the_runs_of_a_sweep(command: Command, folder: Path) -> None:
    words = ("-m", *RUN, "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep")
    outcome = command("train", *words)
    assert outcome.code == 0, outcome.err
    assert "joblib, 2 at a time with" in outcome.out
    assert "[2/2]" in outcome.out
    assert (folder / "sweep/logs/seed-1.txt").read_text().startswith("done: sweep/seed-1/summary.json")
    alone = command("train", *RUN, "seed=1", "run_dir=alone")
    assert alone.code == 0
    for name in ("metrics.jsonl", "summary.json"):
        assert (folder / "sweep/seed-1" / name).exists()
    again = command("train", *words)
    assert "2 done already" in again.out
    assert "[" not in again.out.split("\n", 1)[0]
