"""A command that runs, once or in a sweep."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from varshare_rl.cli import in_one_line, typed
from varshare_rl.config import made_otherwise
from varshare_rl.errors import Terminated
from varshare_rl.run.console import Console
from varshare_rl.run.signals import Interrupted
from varshare_rl.run_files import SUMMARY_FILE


@dataclass(frozen=True)
class RunCommand:
    """A command whose every start is a run in a folder.

    Attributes:
        name: of the command.
        run: makes a run of a configuration and the overrides that it was composed of; returns its folder.
        as_built: checks a configuration as a start would, and returns what ``config.yaml`` would have.
        config_of: reads the configuration of the run in a folder.
        is_done: whether a folder holds this run, as built, at its end; UserError if it holds another.
    """

    name: str
    run: Callable[[Any, Sequence[str]], Path]
    as_built: Callable[[Any], Any]
    config_of: Callable[[Path], Any]
    is_done: Callable[[Path, Any], bool]


def say_done(run_dir: Path, config: Any, stored: Any) -> None:
    """Say that the run of ``config`` is done already, and what in it is not as asked."""
    console, otherwise = Console(config.total_transitions), made_otherwise(config, stored)
    console.message(f"done already: {run_dir / SUMMARY_FILE}")
    if otherwise:
        console.message(f"note: it was {otherwise}")


@dataclass(frozen=True)
class Outcome:
    """The end of one run of a sweep: an exit code, and what went wrong."""

    code: int = 0
    error: str = ""
    stopped: bool = False


def attempt(command: RunCommand, composed: DictConfig, overrides: Sequence[str]) -> Outcome:
    """Make one run of a sweep; what goes wrong in it is said, and ends no other run."""
    try:
        command.run(typed(composed), overrides)
    except Interrupted as stop:
        return Outcome(stop.exit_code, stopped=True)
    except KeyboardInterrupt:
        return Outcome(130, stopped=True)
    except Terminated as stop:
        return Outcome(stop.exit_code, stopped=True)
    except Exception as error:
        message, code = in_one_line(error) or (traceback.format_exc(), 1)
        return Outcome(code, message)
    return Outcome()
