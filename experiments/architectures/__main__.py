"""Read the runs and write ``architectures.csv`` and ``architectures.png``; or measure and write ``times.json``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.architectures import timing
from experiments.architectures.results import COLUMNS, collect, draw, read_times, table
from experiments.bench.contenders import Setting
from experiments.bench.report import machine
from experiments.bench.report import table as section_table
from experiments.results import write_csv
from varshare_rl.cli import errors_in_one_line
from varshare_rl.files import write_json

FOLDER = Path("experiments/architectures")


def measure_times(arguments: Sequence[str]) -> None:
    """``time``: every architecture's update in interleaved rounds."""
    parser = argparse.ArgumentParser(prog="python -m experiments.architectures time")
    parser.add_argument("--rounds", type=int, default=8, help="interleaved rounds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks the benchmark, measures nothing")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; 0: its default")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
    description = machine(options.threads)
    sections = timing.run(options.rounds, Setting(options.quick, options.threads))
    found = [section.as_dict() for section in sections]
    for section in found:
        print(f"\n### {section['title']}\n", *section_table(section), sep="\n")
    options.folder.mkdir(parents=True, exist_ok=True)
    write_json(options.folder / "times.json", {"machine": description, "rounds": options.rounds, "sections": found})


def summarise(arguments: Sequence[str]) -> None:
    """Collect the runs that the command line names; the table goes to the screen."""
    parser = argparse.ArgumentParser(prog="python -m experiments.architectures")
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders of runs, or time")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go, and where times.json is")
    options = parser.parse_args(arguments)
    rows = collect(options.sweeps)
    write_csv(options.folder / "architectures.csv", COLUMNS, rows)
    draw(options.folder / "architectures.png", rows)
    print(*table(rows, read_times(options.folder / "times.json")), sep="\n")


def main(arguments: Sequence[str]) -> None:
    """Runs, or times."""
    with errors_in_one_line():
        if list(arguments[:1]) == ["time"]:
            measure_times(arguments[1:])
        else:
            summarise(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
