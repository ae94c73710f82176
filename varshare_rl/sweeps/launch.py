"""Starts the runs of a sweep: one after another here, or through one of Hydra's launchers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from varshare_rl.cli import CommandLine, own_hydra, put_plugins, terminable
from varshare_rl.envs.division import physical_cores
from varshare_rl.errors import UserError, missing_extra
from varshare_rl.files import write_atomically
from varshare_rl.overrides import literal
from varshare_rl.registry import load_installed_plugins, load_plugins
from varshare_rl.run.signals import answering
from varshare_rl.sweeps.command import Outcome, RunCommand, attempt
from varshare_rl.sweeps.plan import Prepared, Sweep

#: Launchers that come with the extra ``sweeps``.
EXTRA = ("joblib", "submitit_local", "submitit_slurm")
STOP_FILE = ".stop"
LOGS = "logs"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """What a launcher calls, in any process, for every run of a sweep: the screen goes into a file.

    Attributes:
        names: of the runs, in the order in which they are launched.
        threads: that a run may compute with, None for no bound.
        owner: process without which runs end, saved; None where they outlive it.
    """

    command: RunCommand
    plugins: tuple[str, ...]
    folder: Path
    names: tuple[str, ...]
    threads: int | None
    owner: int | None

    def __call__(self, composed: DictConfig) -> Outcome:
        stop = self.folder / STOP_FILE
        if stop.exists():
            return Outcome(stopped=True)
        if self.owner is not None:
            _end_with(self.owner)
        job = HydraConfig.get()
        load_installed_plugins()
        load_plugins(self.plugins)
        put_plugins(composed, self.plugins)
        _cap(composed, self.threads)
        log = self.folder / LOGS / f"{self.names[job.job.num]}.txt"
        with (
            log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file),
            terminable(), _heeding(stop),
        ):  # fmt: skip
            outcome = attempt(self.command, composed, list(job.overrides.task))
        if self.owner not in (None, os.getpid(), os.getppid()):
            os._exit(1)  # joblib's processes would wait for further work
        return outcome


def _cap(composed: DictConfig, threads: int | None) -> None:
    """Let a run compute with so many threads at most, and step environments in as many processes."""
    if threads is None:
        return
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    if threads < physical_cores() and OmegaConf.select(composed, "env.workers") == 0:  # which is one for every core
        composed.env.workers = threads


@contextmanager
def _heeding(stop: Path) -> Iterator[None]:
    """Send this process the signal that the stop file names, once it is there."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            if stop.exists():
                os.kill(os.getpid(), int(stop.read_text()))
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@cache
def _end_with(owner: int) -> None:
    """Send this process SIGTERM without its parent ``owner``: a run saves, one that waits for work just ends."""

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    if owner != os.getpid():
        threading.Thread(target=watch, daemon=True).start()


class Launcher:
    """One of Hydra's launchers, with the configuration of the sweep, for its runs."""

    def __init__(self, command: RunCommand, line: CommandLine, sweep: Sweep, name: str, config: DictConfig) -> None:
        self._command, self._line, self._sweep, self.name = command, line, sweep, name
        self._config, self.options = config, config.hydra.launcher
        self.logs = sweep.folder / LOGS

    def _size(self, runs: int) -> int:
        """Number of runs that are handed over at once."""
        return min(runs, OmegaConf.select(self._config, "hydra.sweeper.max_batch_size") or runs)

    def side_by_side(self, runs: int) -> int | None:
        """Number of runs at a time on this machine; None where another one gives them their cores."""
        if self.name == "joblib":
            from joblib import effective_n_jobs

            return min(self._size(runs), int(effective_n_jobs(self.options.n_jobs)))
        return self._size(runs) if self.name == "submitit_local" else None

    def threads(self, runs: int) -> int | None:
        """Number of threads that a run may compute with, of this machine's cores; None for no bound."""
        side_by_side = self.side_by_side(runs)
        return None if side_by_side is None else max(1, physical_cores() // side_by_side)

    def launch(self, prepared: Sequence[Prepared]) -> list[Outcome]:
        """Make runs side by side; a signal to this process lets all of them save and stop."""
        size, threads = self._size(len(prepared)), self.threads(len(prepared))
        folder = self._sweep.folder
        self.logs.mkdir(parents=True, exist_ok=True)
        names = tuple(one.job.name for one in prepared)
        owner = os.getpid() if self.name == "joblib" else None
        task: Any = Task(self._command, tuple(self._line.plugins), folder.absolute(), names, threads, owner)
        outcomes: list[Outcome] = []
        with own_hydra() as composer, _passing_on(folder / STOP_FILE) as received:
            context = HydraContext(config_loader=composer.config_loader, callbacks=Callbacks(self._config))
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=context, task_function=task, config=self._config
            )
            for begin in range(0, len(prepared), size):
                overrides = [one.overrides for one in prepared[begin : begin + size]]
                if not received:
                    returned = launcher.launch(overrides, initial_job_idx=begin)
                    outcomes += [each.return_value for each in returned]
        outcomes += [Outcome(stopped=True)] * (len(prepared) - len(outcomes))
        code = 128 + received[0] if received else 0
        return [replace(outcome, code=code) if outcome.stopped and code else outcome for outcome in outcomes]


@contextmanager
def _passing_on(stop: Path) -> Iterator[list[int]]:
    """Write the first signal to stop into a file that all runs look at, instead of dying; a second acts at once.

    They are told of the other signal than came, so that a run that the terminal has sent the same one hears of none
    a second time, on which it would not save.
    """
    stop.unlink(missing_ok=True)
    received: list[int] = []

    def answer(number: int) -> None:
        other = signal.SIGTERM if number == signal.SIGINT else signal.SIGINT
        received.append(number)
        write_atomically(stop, str(int(other)))
        print("stopping: every run saves first; once more to end at once", flush=True)

    with answering(answer, each=False):
        yield received


def hydra_config(line: CommandLine, sweep: Sweep) -> DictConfig:
    """Compose what a sweep is launched with, that is how and by whom.

    Raises:
        UserError: an option is wrong.
    """
    given = [*sweep.hydra, f"hydra.sweep.dir={literal(str(sweep.folder))}", "hydra.mode=MULTIRUN"]
    with own_hydra() as composer:
        config: DictConfig = composer.compose_config(
            config_name=line.command, overrides=[*sweep.fixed, *given], run_mode=RunMode.MULTIRUN
        )
    return config


def launcher_name(sweep: Sweep) -> str:
    """Return the name of the launcher, nothing for one run after another in this process.

    Raises:
        UserError: it comes with an extra that is not installed, or there is no such sweeper.
    """
    sweeper = next((item for item in sweep.hydra if item.startswith("hydra/sweeper=")), "=basic")
    if sweeper.partition("=")[2] not in ("basic", "optuna"):
        raise UserError(f"unknown {sweeper}; choose optuna, or leave it out for all combinations")
    given = next((item for item in sweep.hydra if item.startswith("hydra/launcher=")), "=basic")
    name = given.partition("=")[2]
    if name in EXTRA:
        plugin = f"hydra_plugins.hydra_{name.partition('_')[0]}_launcher"
        try:
            missing = find_spec(plugin) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            raise missing_extra(f"{given} needs its Hydra plugin", "sweeps")
    return "" if name == "basic" else name
