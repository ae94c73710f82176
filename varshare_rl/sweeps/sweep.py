"""A sweep from its first check to its last table."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf

from varshare_rl.cli import CommandLine, compose_config, errors_in_one_line, read_command_line, typed
from varshare_rl.errors import Terminated, UserError
from varshare_rl.fields import check_bounds
from varshare_rl.files import write_atomically
from varshare_rl.ranks import several
from varshare_rl.run.console import Console
from varshare_rl.run.signals import Interrupted
from varshare_rl.run_files import SUMMARY_FILE
from varshare_rl.sweeps.command import Outcome, RunCommand, attempt
from varshare_rl.sweeps.launch import Launcher, hydra_config, launcher_name
from varshare_rl.sweeps.plan import Job, Prepared, check_jobs, read_sweep
from varshare_rl.sweeps.results import pool, show, to_csv
from varshare_rl.sweeps.search import OptunaConfig, Search

POLL_SECONDS = 1.0


def run_training(command: RunCommand) -> None:
    """Run the command line: one run, or with ``-m`` a sweep."""
    with errors_in_one_line():
        line = read_command_line(command.name)
        if line is None:
            return
        if line.multirun and several():
            raise UserError(
                "-m makes many runs, and torchrun starts several processes for one; leave one of them out"
            )
        if line.multirun:
            raise SystemExit(sweep(command, line))
        composed, overrides = compose_config(line)
        try:
            command.run(typed(composed), overrides)
        except Interrupted as stop:
            raise SystemExit(stop.exit_code) from None


def sweep(command: RunCommand, line: CommandLine) -> int:
    """Make all runs of a sweep that are not done yet, and show what came out; returns the exit code.

    Raises:
        UserError: something is impossible; nothing has been started.
    """
    asked, config = read_sweep(line), None
    name, searching = launcher_name(asked), "hydra/sweeper=optuna" in asked.hydra
    given = {item.partition("=")[0] for item in asked.fixed} | asked.swept.keys()
    if command.name == "train" and "pretrained" in given and asked.hydra:
        raise UserError(f"runs of a sweep with from= are made one after another here; leave out {asked.hydra[0]}")
    if asked.hydra:
        config = hydra_config(line, asked)
    launcher = Launcher(command, line, asked, name, config) if name and config is not None else None
    if searching and config is not None:
        options = cast(OptunaConfig, OmegaConf.to_object(config.hydra.sweeper))
        check_bounds(options, "hydra.sweeper.")
        search = Search(asked, options)
        check_jobs(command, line, search.probes(), asked.overwrite)
        runs = Runs(command, launcher, options.n_trials * search.runs_per_trial)
        search.open()
        runs.say(f"{options.n_trials} trials of {search.runs_per_trial} runs in {asked.folder}")
        jobs, outcomes = make_trials(runs, search, lambda jobs: check_jobs(command, line, jobs, asked.overwrite))
    elif asked.searched:
        key, override = next(iter(asked.searched.items()))
        raise UserError(
            f"{override.input_line} is a range to search in, not a list of values; add hydra/sweeper=optuna, "
            f"or give {key}=<a>,<b>"
        )
    else:
        prepared = check_jobs(command, line, asked.grid(), asked.overwrite)
        runs = Runs(command, launcher, len(prepared))
        done, begun = sum(one.done for one in prepared), sum(one.begun and not one.done for one in prepared)
        runs.say(
            f"{len(prepared)} runs in {asked.folder}: {done} done already, {begun} to go on, "
            f"{len(prepared) - done - begun} to start"
        )
        for otherwise in sorted({one.otherwise for one in prepared if one.otherwise}):
            runs.say(f"note: {sum(one.otherwise == otherwise for one in prepared)} of them were {otherwise}")
        jobs, outcomes = [one.job for one in prepared], runs.make(prepared)
    results = pool(jobs)
    if results.rows and not any(outcome.stopped for outcome in outcomes):
        show(results)
        asked.folder.mkdir(parents=True, exist_ok=True)  # where all runs have folders elsewhere
        write_atomically(asked.folder / "sweep.csv", to_csv(results))
    return runs.close(jobs, outcomes, line)


def make_trials(
    runs: Runs, search: Search, check: Callable[[list[Job]], list[Prepared]]
) -> tuple[list[Job], list[Outcome]]:
    """Make the trials of a search until there are enough, or it is stopped; returns runs and how they ended."""
    jobs = search.told()
    outcomes = [Outcome()] * len(jobs)
    runs.number = len(jobs)
    for batch in search.trials():
        own = list({job.name: job for _, trial in batch for job in trial}.values())
        prunes = search.prunes and len(batch) == 1
        made, pruned = list[Job](), False
        for portion in [[job] for job in own] if prunes else [own]:
            outcomes += runs.make(check(portion))
            made += portion
            if any(outcome.stopped for outcome in outcomes):
                return jobs + made, outcomes
            pruned = prunes and search.below_median(batch[0][0], made)
            if pruned:
                break
        for number, trial in batch:
            search.tell(number, [job for job in trial if job in made], pruned)
        jobs += made
    return jobs, outcomes


class Runs:
    """Makes the runs of a sweep, says which one it is at, and how long the rest will take.

    Args:
        command: whose runs they are.
        launcher: starts them side by side; None: one after another, in this process.
        total: number of all runs.

    Attributes:
        number: of runs that have been taken up, or were done.
    """

    def __init__(self, command: RunCommand, launcher: Launcher | None, total: int) -> None:
        self._command, self._launcher, self.total = command, launcher, total
        self._console = Console(total)
        self.number = 0
        self._made, self._started = 0, time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.message(text)

    def make(self, prepared: Sequence[Prepared]) -> list[Outcome]:
        """Make those runs that are not done, and return how each one ended."""
        if self._launcher is None:
            return self._make_in_turn(prepared)
        left = [one for one in prepared if not one.done]
        self.number += len(prepared) - len(left)
        returned: dict[str, Outcome] = {}
        if left:
            at_once, threads = self._launcher.side_by_side(len(left)), self._launcher.threads(len(left))
            bounds = "" if at_once is None else f", {at_once} at a time with {threads} threads each"
            self.say(f"{self._launcher.name}{bounds}; the screen of every run is in {self._launcher.logs}")
            with self._watched(left) as waiting:
                try:
                    ended = self._launcher.launch(left)
                    returned = {one.job.name: outcome for one, outcome in zip(left, ended, strict=True)}
                except (KeyboardInterrupt, Terminated) as stop:
                    returned = {one.job.name: Outcome(_code(stop), stopped=True) for one in left}
                except Exception as error:  # of the launcher: a process that was killed, a queue that is down
                    lost = Outcome(1, f"{self._launcher.name}: {type(error).__name__}: {error}")
                    returned = dict.fromkeys(waiting.values(), lost)
        return [returned.get(one.job.name, Outcome()) for one in prepared]

    def _make_in_turn(self, prepared: Sequence[Prepared]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for index, one in enumerate(prepared):
            self.number += 1
            if outcomes and outcomes[-1].stopped:
                outcomes.append(Outcome(stopped=True))
            elif one.done:
                outcomes.append(Outcome())
            else:
                further = self.total - self.number + index + 1 - len(prepared)
                left = self._left(further + sum(not other.done for other in prepared[index:]))
                self.say(f"[{self.number}/{self.total}] {one.job.name}{left}")
                try:
                    outcomes.append(attempt(self._command, one.composed, one.overrides))
                except (KeyboardInterrupt, Terminated) as stop:
                    outcomes.append(Outcome(_code(stop), stopped=True))
                self._made += 1
                if outcomes[-1].error:
                    self.say(f"{one.job.name} failed: {outcomes[-1].error.strip().splitlines()[-1]}")
        return outcomes

    def _left(self, runs: int) -> str:
        """Say how long so many runs will take, at the pace of those made by now."""
        if not self._made:
            return ""
        seconds = (time.monotonic() - self._started) / self._made * runs
        return f", {timedelta(seconds=round(seconds))} left for all"

    @contextmanager
    def _watched(self, left: Sequence[Prepared]) -> Iterator[dict[Path, str]]:
        """Inside, say when a run is done, wherever it is made; gives the names of those that are not."""
        ended = threading.Event()
        waiting = {one.job.folder / SUMMARY_FILE: one.job.name for one in left}
        before = {path: _written(path) for path in waiting}

        def look() -> None:
            for path in [path for path in waiting if _written(path) not in (None, before[path])]:
                self.number, self._made = self.number + 1, self._made + 1
                self.say(
                    f"[{self.number}/{self.total}] {waiting.pop(path)} done{self._left(self.total - self.number)}"
                )

        def watch() -> None:
            while not ended.wait(POLL_SECONDS):
                look()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield waiting
        finally:
            ended.set()
            watcher.join()
            look()

    def close(self, jobs: Sequence[Job], outcomes: Sequence[Outcome], line: CommandLine) -> int:
        """Say what failed and how to go on, and return the exit code."""
        for error in dict.fromkeys(outcome.error for outcome in outcomes if outcome.error):
            names = [job.name for job, outcome in zip(jobs, outcomes, strict=False) if outcome.error == error]
            print(f"error: run {', '.join(names)}: {error.rstrip()}", file=sys.stderr)
        codes = {outcome.code for outcome in outcomes if outcome.stopped} or {o.code for o in outcomes}
        if any(outcome.stopped or outcome.error for outcome in outcomes):
            done = sum(outcome == Outcome() for outcome in outcomes)
            self.say(f"{done} of {self.total} runs are done; the same command goes on with the others:")
            self.say(f"    {again(line)}")
        return min(codes - {0}, default=0)


def again(line: CommandLine) -> str:
    """Return the command line that goes on with a sweep, for a shell."""
    plugins = [f"plugins=[{','.join(line.plugins)}]"] if line.plugins else []
    words = [word for word in sys.argv[1:] if not word.startswith("overwrite=")]
    return shlex.join(["python", "-m", f"varshare_rl.{line.command}", *words, *plugins])


def _code(stop: KeyboardInterrupt | Terminated) -> int:
    return 130 if isinstance(stop, KeyboardInterrupt) else stop.exit_code


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
