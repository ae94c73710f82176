"""Draw figures and write numbers from what runs left behind.

    python -m varshare_rl.report compare runs/<a> runs/<b> runs/<sweep>
    python -m varshare_rl.report sharing run=runs/<folder>
    python -m varshare_rl.report continual runs/<a> runs/<b> reference=runs/<single tasks>

    compare            runs side by side, seeds pooled: a page, figures and tables
    sharing            what the tasks of a run share, from a checkpoint
    continual          continual-learning methods compared over seeds

`report <name> --help` says more.
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from varshare_rl.cli import errors_in_one_line, fail, run_command, take_plugins
from varshare_rl.command_line import is_folder
from varshare_rl.commands.common import ReportConfig, read_options
from varshare_rl.entry import help_text, wants_help
from varshare_rl.registry import registered


def main() -> None:
    """Take the first word of the command line for the report's name; all else but folders goes to Hydra."""
    with errors_in_one_line():
        take_plugins()
    reports: dict[str, type[ReportConfig]] = registered("report")
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in reports:
        given = f"unknown report {name!r}" if name else "no report given"
        fail(f"{given}; there is {', '.join(reports)}: python -m varshare_rl.report sharing run=runs/<folder>")
    config = reports[name]
    del sys.argv[1]
    if wants_help(sys.argv[1:]):
        print(help_text(config.__module__))
        return
    folders = [item for item in sys.argv[1:] if config.takes_folders and is_run_folder(item)]
    sys.argv[1:] = [item for item in sys.argv[1:] if item not in folders]

    def make(composed: DictConfig) -> None:
        read_options(composed, config, config.needed).build(folders)

    run_command(f"report_{name}", make, config)


def is_run_folder(argument: str) -> bool:
    """Return True for a folder, rather than ``key=value`` or an option of Hydra."""
    return is_folder(argument) or ("=" not in argument and not argument.startswith("-"))


command = main
