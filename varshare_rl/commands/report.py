"""Draw figures and write numbers from what runs left behind.

    python -m varshare_rl.report sharing run=runs/<folder>
    python -m varshare_rl.report continual runs/<a> runs/<b> reference=runs/<single tasks>

    sharing            what the tasks of a run share, from a checkpoint
    continual          continual-learning methods compared over seeds

`report <name> --help` says more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hydra.core.config_store import ConfigStore

from varshare_rl.cli import fail, run_command
from varshare_rl.commands.report_continual import ContinualReportConfig, report_continual
from varshare_rl.commands.report_sharing import SharingReportConfig, report_sharing
from varshare_rl.entry import help_text, wants_help


class Report(NamedTuple):
    """A report: its options and what makes it, in a file whose docstring is its help.

    ``make`` takes the composed options and, where it ``takes_folders``, those among the arguments.
    """

    config: type
    make: Callable[..., None]
    takes_folders: bool = False


#: What ``python -m varshare_rl.report`` can be asked for, by its first word; ``configs/report_<name>.yaml``.
REPORTS = {
    "sharing": Report(SharingReportConfig, report_sharing),
    "continual": Report(ContinualReportConfig, report_continual, takes_folders=True),
}


def main() -> None:
    """Take the first word of the command line for the report's name; all else but folders goes to Hydra."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in REPORTS:
        given = f"unknown report {name!r}" if name else "no report given"
        fail(f"{given}; there is {', '.join(REPORTS)}: python -m varshare_rl.report sharing run=runs/<folder>")
    report = REPORTS[name]
    make = report.make
    del sys.argv[1]
    if wants_help(sys.argv[1:]):
        print(help_text(make.__module__))
        return
    if report.takes_folders:
        folders = [item for item in sys.argv[1:] if is_folder(item)]
        sys.argv[1:] = [item for item in sys.argv[1:] if item not in folders]
        make = partial(make, folders=folders)
    ConfigStore.instance().store(name=f"report_{name}_schema", node=report.config)
    run_command(f"report_{name}", make)


def is_folder(argument: str) -> bool:
    """Return True for a folder, rather than ``key=value`` or an option of Hydra."""
    return Path(argument).is_dir() or ("=" not in argument and not argument.startswith("-"))


command = main
