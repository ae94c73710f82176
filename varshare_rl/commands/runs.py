"""List, show and remove runs.

    python -m varshare_rl.runs list              # those in runs/, or in the folders given
    python -m varshare_rl.runs show runs/<folder>
    python -m varshare_rl.runs rm runs/<folder> ...

list   state (done, running, pruned, stopped), success, return, transitions and time of every run
show   the same of one run, every task's results, and what is in its folder
rm     asks before it removes run folders, unless yes=true or --yes; refuses those of running ones

More: docs/evaluation.md.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from varshare_rl.entry import help_text, wants_help
from varshare_rl.errors import UserError
from varshare_rl.run.listing import FoundRun, is_held, read_run
from varshare_rl.run_files import CONFIG_FILE, find_runs, is_run

WORDS = ("list", "show", "rm")
YES = ("yes=true", "--yes", "-y")
STYLES = {"done": "green", "running": "cyan", "pruned": "blue", "stopped": "yellow"}


def main(arguments: Sequence[str]) -> None:
    """Do what the first word says with the folders behind it. Raises UserError."""
    word, *rest = arguments or [""]
    if word not in WORDS:
        given = f"unknown word {word!r}" if word else "no word given"
        raise UserError(f"{given}; there is {', '.join(WORDS)}: python -m varshare_rl.runs list")
    agreed = word == "rm" and any(item in YES for item in rest)
    folders = [Path(item) for item in rest if not (word == "rm" and item in YES)]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}; give run folders, such as runs/<name>")
    if word == "list":
        list_runs(folders or [Path("runs")])
    elif word == "show":
        if len(folders) != 1:
            raise UserError(f"show takes one run folder, {len(folders)} are given: show runs/<name>")
        show(_require_run(folders[0]))
    else:
        remove(folders, agreed)


def list_runs(folders: Sequence[Path]) -> None:
    """Print a table of the runs in some folders."""
    found = [read_run(run) for folder in folders for run in find_runs(folder)]
    if not found:
        print(f"no runs in {', '.join(map(str, folders))}")
        return
    console = _console()
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("run", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("success", "return", "transitions", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [_row(run) for run in found]
    for run, row in zip(found, rows, strict=True):
        table.add_row(Text(str(run.folder)), Text(run.state, STYLES[run.state]), *map(Text, row))
    longest = max(len(str(run.folder)) for run in found)
    console.print(table, width=longest + 80, crop=False, overflow="ignore")


def _row(run: FoundRun) -> list[str]:
    done = f"{run.transitions:,}"
    if run.total_transitions and run.transitions < run.total_transitions:
        done += f" ({100 * run.transitions // run.total_transitions} %)"
    return [
        "-" if run.success is None else f"{run.success:.2f}",
        "-" if run.mean_return is None else f"{run.mean_return:,.1f}",
        done,
        _time(run.seconds),
    ]


def show(folder: Path) -> None:
    """Print what a run folder says of its run."""
    from varshare_rl.overrides import override

    run = read_run(folder)
    success, earned, done, took = _row(run)
    total = f" of {run.total_transitions:,}" if run.total_transitions else ""
    print(f"{folder}: {run.state}")
    print(f"  what         {run.kind}, seed {run.seed}")
    print(f"  transitions  {done.partition(' ')[0]}{total} in {took}")
    print(f"  success      {success}")
    print(f"  return       {earned}")
    size = _size(folder)
    print(f"  folder       {size / 1e6:.1f} MB: {', '.join(sorted(path.name for path in _visible(folder)))}")
    width = max((len(task) for task in run.tasks), default=0)
    for task, row in run.tasks.items():
        numbers = [f"{name} {value:,.2f}" for name in ("success", "return") if (value := row.get(name)) is not None]
        print(f"  {task:<{width}}  {', '.join(numbers)}")
    if run.state == "stopped":
        command = "continual" if "method:" in (folder / CONFIG_FILE).read_text(encoding="utf-8") else "train"
        print(f"go on with: python -m varshare_rl.{command} {override('resume', folder)}")


def remove(folders: Sequence[Path], agreed: bool) -> None:
    """Remove run folders once it is agreed. Raises UserError, before anything is removed, for what is none."""
    if not folders:
        raise UserError("rm takes run folders, and none is given: rm runs/<name>")
    for folder in folders:
        if is_held(_require_run(folder)):
            raise UserError(f"{folder} is running; end it first, nothing was removed")
    if not agreed:
        size = sum(_size(folder) for folder in folders)
        for folder in folders:
            print(folder)
        if not sys.stdin.isatty():
            raise UserError("rm asks before it removes runs, and nobody can answer here; add yes=true")
        runs = "1 run" if len(folders) == 1 else f"{len(folders)} runs"
        if input(f"remove {runs}, {size / 1e6:.1f} MB? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return
    from varshare_rl.run.folder import held_folder  # imports torch

    for folder in folders:
        with held_folder(folder):
            shutil.rmtree(folder)
        print(f"removed: {folder}")


def _require_run(folder: Path) -> Path:
    if folder.is_symlink() or not is_run(folder):
        raise UserError(f"{folder} is no run folder: it has no config.yaml with metrics or checkpoints beside it")
    return folder


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _time(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def _console() -> RichConsole:
    console = RichConsole()
    return console if console.is_terminal else RichConsole(width=200, force_terminal=False)


def command() -> None:
    """Run the command line."""
    if wants_help(sys.argv[1:]):
        print(help_text(__name__))
        return
    try:
        main(sys.argv[1:])
    except (UserError, OSError, ValueError) as error:  # the latter of names that no folder can have
        print("error:", " ".join(str(error).split())[:500], file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
