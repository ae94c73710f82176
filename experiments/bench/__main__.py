"""``python -m experiments.bench [choices]``: measure, print, and write tables into ``experiments/bench/``."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.bench.contenders import Setting
from experiments.bench.report import Section, machine, table, write

CHOICES = ("layer", "update", "gradient", "engine", "train", "scale", "start", "memory", "ranks")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the choices on the command line, all unless some are named."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__)
    parser.add_argument("choices", nargs="*", metavar="choice", help=f"of {', '.join(CHOICES)}; default: all")
    parser.add_argument("--rounds", type=int, default=8, help="interleaved rounds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks the benchmark, measures nothing")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: its default")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the tables go")
    options = parser.parse_args(arguments)
    unknown = [choice for choice in options.choices if choice not in CHOICES]
    if unknown:
        parser.error(f"unknown choice {unknown[0]!r}: choose {', '.join(CHOICES)}")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
    setting = Setting(options.quick, options.threads)
    for choice in options.choices or CHOICES:
        begin = time.perf_counter()
        description = machine(options.threads)
        sections: list[Section] = importlib.import_module(f"experiments.bench.{choice}").run(
            options.rounds, setting
        )
        found = [section.as_dict() for section in sections]
        for section in found:
            print(f"\n### {section['title']}\n", *table(section), sep="\n", flush=True)
        write(options.folder, {choice: {"machine": description, "rounds": options.rounds, "sections": found}})
        print(f"\n({choice} took {time.perf_counter() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
