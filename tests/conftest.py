"""What all tests share: one thread, fixed seeds, and the commands called in this process."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import last_of_each

from varshare_rl.commands import calibrate, evaluate, export, prune, report, runs, train
from varshare_rl.continual import command as continual

# Small matrices: a second thread costs more than it brings, and tests run side by side.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "continual": continual,
    "evaluate": evaluate,
    "report": report,
    "export": export,
    "prune": prune,
    "calibrate": calibrate,
    "runs": runs,
}
#: Options of those that choose no components.
OPTIONS: dict[str, type] = {
    "evaluate": evaluate.EvaluateConfig,
    "export": export.ExportConfig,
    "prune": prune.PruneConfig,
    "calibrate": calibrate.CalibrateConfig,
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder that is the current one, so that nothing is written elsewhere."""
    with chdir(tmp_path):
        yield tmp_path


@pytest.fixture
def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """``command("train", "env=pointmass", ...)``: an entry point with these arguments, in this process."""

    def call(name: str, *arguments: str) -> Outcome:
        words = last_of_each(arguments) if name in ("train", "continual") else arguments
        monkeypatch.setattr(sys, "argv", [f"varshare_rl.{name}", *words])
        code: int | str | None = 0
        try:
            COMMANDS[name].command()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def command_once(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``command_once("train", ..., "run_dir=run")``: the folder of a run, made once and copied from then on."""

    def call(name: str, *arguments: str) -> Path:
        key = hashlib.sha256(" ".join((name, *arguments)).encode()).hexdigest()
        kept = tmp_path_factory.getbasetemp() / "kept" / key
        run_dir = Path(next(item.removeprefix("run_dir=") for item in arguments if item.startswith("run_dir=")))
        if kept.exists():
            shutil.copytree(kept, run_dir)
            return run_dir
        outcome = command(name, *arguments)
        assert outcome.code == 0, outcome.err
        assert outcome.err == ""
        shutil.copytree(run_dir, kept)
        return run_dir

    return call
