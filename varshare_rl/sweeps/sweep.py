"""A sweep from its first check to its last table."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from varshare_rl.cli import CommandLine, compose_config, errors_in_one_line, read_command_line, typed
from varshare_rl.errors import Terminated, UserError
from varshare_rl.files import write_atomically
from varshare_rl.run.console import Console, duration
from varshare_rl.run.folder import SUMMARY_FILE
from varshare_rl.run.loop import Interrupted
from varshare_rl.sweeps.command import Outcome, RunCommand, attempt
from varshare_rl.sweeps.launch import Launcher, launcher_name
from varshare_rl.sweeps.plan import Job, Prepared, check_jobs, read_sweep
from varshare_rl.sweeps.results import pool, show, to_csv

POLL_SECONDS = 1.0


def run_training(command: RunCommand) -> None:
    """Run the command line: one run, or with ``-m`` a sweep."""
    with errors_in_one_line():
        line = read_command_line(command.name)
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
    asked = read_sweep(line)
    launcher = launcher_name(asked)
    if asked.searched:
        key, override = next(iter(asked.searched.items()))
        raise UserError(
            f"{override.input_line} is a range to search in, not a list of values; add hydra/sweeper=optuna, "
            f"or give {key}=<a>,<b>"
        )
    prepared = check_jobs(command, line, asked.grid(), asked.overwrite)
    runs = Runs(command, Launcher(command, line, asked, launcher) if launcher else None, len(prepared))
    done, begun = sum(one.done for one in prepared), sum(one.begun and not one.done for one in prepared)
    runs.say(
        f"{len(prepared)} runs in {asked.folder}: {done} done already, {begun} to go on, "
        f"{len(prepared) - done - begun} to start"
    )
    outcomes = runs.make(prepared)
    results = pool([one.job for one in prepared])
    if results.rows:
        show(results)
        write_atomically(asked.folder / "sweep.csv", to_csv(results))
    return runs.close([one.job for one in prepared], outcomes, line)


class Runs:
    """Makes the runs of a sweep, says which one it is at, and how long the rest will take.

    Args:
        command: whose runs they are.
        launcher: starts them side by side; None: one after another, in this process.
        total: number of all runs.
    """

    def __init__(self, command: RunCommand, launcher: Launcher | None, total: int) -> None:
        self._command, self._launcher, self.total = command, launcher, total
        self._console = Console(total)
        self._number = 0  # of the runs that have been taken up, or were done
        self._made, self._started = 0, time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.message(text)

    def make(self, prepared: Sequence[Prepared]) -> list[Outcome]:
        """Make those runs that are not done, and return how each one ended."""
        if self._launcher is None:
            return self._make_in_turn(prepared)
        left = [one for one in prepared if not one.done]
        self._number += len(prepared) - len(left)
        returned: dict[str, Outcome] = {}
        if left:
            with self._watched(left):
                try:
                    ended = self._launcher.launch(left)
                    returned = {one.job.name: outcome for one, outcome in zip(left, ended, strict=True)}
                except (KeyboardInterrupt, Terminated) as stop:
                    returned = {one.job.name: Outcome(_code(stop), stopped=True) for one in left}
                except Exception as error:  # of the launcher: a process that was killed, a queue that is down
                    lost = Outcome(1, f"{self._launcher.name}: {type(error).__name__}: {error}")
                    returned = {one.job.name: lost for one in left}
        return [returned.get(one.job.name, Outcome()) for one in prepared]

    def _make_in_turn(self, prepared: Sequence[Prepared]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for one in prepared:
            self._number += 1
            if outcomes and outcomes[-1].stopped:
                outcomes.append(Outcome(stopped=True))
            elif one.done:
                outcomes.append(Outcome())
            else:
                self.say(f"[{self._number}/{self.total}] {one.job.name}{self._left(self._number - 1)}")
                try:
                    outcomes.append(attempt(self._command, one.composed, one.overrides))
                except (KeyboardInterrupt, Terminated) as stop:
                    outcomes.append(Outcome(_code(stop), stopped=True))
                self._made += 1
        return outcomes

    def _left(self, ended: int) -> str:
        """Say how long the runs after so many will take, at the pace of those made by now."""
        if not self._made:
            return ""
        seconds = (time.monotonic() - self._started) / self._made * (self.total - ended)
        return f", {duration(seconds)} left for all"

    @contextmanager
    def _watched(self, left: Sequence[Prepared]) -> Iterator[None]:
        """Inside, say when a run is done, wherever it is made."""
        ended = threading.Event()
        waiting = {one.job.folder / SUMMARY_FILE: one.job.name for one in left}
        before = {path: _written(path) for path in waiting}

        def look() -> None:
            for path in [path for path in waiting if _written(path) not in (None, before[path])]:
                self._number, self._made = self._number + 1, self._made + 1
                self.say(f"[{self._number}/{self.total}] {waiting.pop(path)} done{self._left(self._number)}")

        def watch() -> None:
            while not ended.wait(POLL_SECONDS):
                look()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
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


def _code(stop: BaseException) -> int:
    return 130 if isinstance(stop, KeyboardInterrupt) else 143


def _written(path: object) -> float | None:
    try:
        return path.stat().st_mtime  # type: ignore[attr-defined,no-any-return]
    except OSError:
        return None
