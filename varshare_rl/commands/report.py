"""``python -m varshare_rl.report <name>``: figures and numbers from what runs left behind.

python -m varshare_rl.report sharing run=runs/<folder>
python -m varshare_rl.report continual runs/<a> runs/<b> reference=runs/<single tasks> out=comparison
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console

from varshare_rl.assemble import load_agent
from varshare_rl.cli import fail, run_command
from varshare_rl.config import Device
from varshare_rl.errors import UserError
from varshare_rl.files import write_atomically, write_json
from varshare_rl.reporting.continual_measures import measures
from varshare_rl.reporting.continual_runs import (
    ContinualRun,
    check_comparable,
    check_references,
    read_continual_runs,
    reference_document,
)
from varshare_rl.run.console import PLAIN_WIDTH
from varshare_rl.run.sharing import sharing_document
from varshare_rl.run.sharing_monitor import latest_observation


@dataclass
class SharingReportConfig:
    """Which run, which of its checkpoints (``last`` or ``best``), and the folder for the report."""

    run: str = MISSING
    checkpoint: str = "last"
    out: str | None = None  # default: <run>/report_sharing


def report_sharing(composed: DictConfig) -> None:
    """Write ``sharing.json`` and its figures for a checkpoint; gradients as the run last observed them."""
    if OmegaConf.is_missing(composed, "run"):
        raise UserError("run is missing; give the folder of a run: run=runs/<folder>")
    options = cast(SharingReportConfig, OmegaConf.to_object(composed))
    run_dir = Path(options.run)
    out = run_dir / "report_sharing" if options.out is None else Path(options.out)
    agent = load_agent(run_dir, options.checkpoint, Device.cpu)
    transitions = agent.state["transitions"]
    document = sharing_document(agent.algorithm.trained_modules(), agent.suite.task_names, transitions)
    if not document["layers"]:
        raise UserError(
            f"{run_dir} has network={agent.config.network.name}, whose weights are the same for all tasks: there "
            "is no sharing to report; give a run of another network"
        )
    observed = latest_observation(run_dir, transitions)
    if observed is not None:
        document["conflict"] = observed["conflict"]
    write_figures(out, document)
    print(f"written: {out}")


def write_figures(out: Path, document: dict[str, Any]) -> None:
    """Write the document and a PNG for every figure that it has numbers for."""
    from varshare_rl.reporting.figures import to_png  # takes a while to import: after what can be wrong
    from varshare_rl.reporting.sharing_figures import sharing_figures

    make_folder(out)
    for name, figure in sharing_figures(document).items():
        write_atomically(out / f"{name}.png", to_png(figure))
    write_json(out / "sharing.json", document)


@dataclass
class ContinualReportConfig:
    """Besides the folders of runs, those with single tasks learnt from scratch, and the folder for the report."""

    reference: Any = None  # a folder, or a list of folders
    out: str | None = None  # default: <run>/report_continual for one run, else report_continual


def report_continual(composed: DictConfig, folders: Sequence[str]) -> None:
    """Compare methods over seeds: ``continual.json``, ``continual.csv`` and figures, and figures of every run."""
    options = cast(ContinualReportConfig, OmegaConf.to_object(composed))
    if not folders:
        raise UserError("no runs to report; give their folders: report continual runs/<a> runs/<b>")
    reference = reference_folders(options.reference)
    runs, references = read_continual_runs(folders), read_continual_runs(reference)
    if not runs:
        raise UserError(f"no run among {', '.join(folders)}; give the folders of continual runs")
    from varshare_rl.reporting.continual_table import compare, group_labels, screen_tables

    documents = [run.document for run in runs]
    labels = group_labels(documents, [run.config for run in runs])
    check_comparable(runs, labels)
    if references:
        check_references(runs, references)
    found = [measures(run.document, reference_document(run, references) if references else None) for run in runs]
    rows = compare(labels, documents, found)
    default = runs[0].folder / "report_continual" if len(runs) == 1 else Path("report_continual")
    out = default if options.out is None else Path(options.out)
    write_continual(out, runs, {
        "suite": documents[0]["suite"],
        "algorithm": documents[0]["algorithm"],
        "tasks": runs[0].learnt,
        "measure": found[0]["measure"],
        "references": [str(reference.folder) for reference in references],
        "methods": rows,
        "runs": [
            {"folder": str(run.folder), "label": label, "seed": run.seed, "measures": its,
             "conditions": run.document["conditions"]}
            for run, label, its in zip(runs, labels, found, strict=True)
        ],
    })  # fmt: skip
    Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(
        *screen_tables(rows, found[0]["measure"])
    )
    print(f"mean over seeds, 95 % bootstrap interval below; written: {out}")


def reference_folders(given: Any) -> list[str]:
    """The folders of ``reference=``, which takes one or a list."""
    folders = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders):
        raise UserError(f"reference is {given!r}; give a folder of runs, or a list of them")
    return folders


def write_continual(out: Path, runs: Sequence[ContinualRun], document: dict[str, Any]) -> None:
    """Write the comparison, and the figures of every run, in folders of their own where there are several."""
    from varshare_rl.reporting.continual_figures import comparison_figures, run_figures
    from varshare_rl.reporting.continual_table import to_csv
    from varshare_rl.reporting.figures import to_png

    labels = [run["label"] for run in document["runs"]]
    compared = comparison_figures(document["methods"], document["measure"], labels, [run.document for run in runs])
    figures = {out / name: made for name, made in compared.items()}
    for run, name in zip(runs, run_names(runs), strict=True):
        figures |= {out / name / figure: made for figure, made in run_figures(run.document).items()}
    for path, figure in figures.items():
        make_folder(path.parent)
        write_atomically(path.with_name(f"{path.name}.png"), to_png(figure))
    write_atomically(out / "continual.csv", to_csv(document["methods"]))
    write_json(out / "continual.json", document)


def run_names(runs: Sequence[ContinualRun]) -> list[str]:
    """What sets the paths of runs apart, as names of folders; that of a single run is empty."""
    if len(runs) == 1:
        return [""]
    folders = [run.folder.resolve() for run in runs]
    common = Path(os.path.commonpath(folders))
    return ["_".join(folder.relative_to(common).parts) for folder in folders]


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}); give another out") from error


class Report(NamedTuple):
    """A report: its options and what makes it. ``configs/report_<name>.yaml`` names ``report_<name>_schema``.

    ``make`` takes the options and, where it ``takes_folders``, those among the arguments.
    """

    config: type
    make: Callable[..., None]
    takes_folders: bool = False


#: What ``python -m varshare_rl.report`` can be asked for, by its first word.
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
    del sys.argv[1]
    make = report.make
    if report.takes_folders:
        folders = [item for item in sys.argv[1:] if is_folder(item)]
        sys.argv[1:] = [item for item in sys.argv[1:] if item not in folders]
        make = partial(make, folders=folders)
    ConfigStore.instance().store(name=f"report_{name}_schema", node=report.config)
    run_command(f"report_{name}", make)


def is_folder(argument: str) -> bool:
    """Whether an argument is a folder rather than ``key=value`` or an option of Hydra."""
    return Path(argument).is_dir() or ("=" not in argument and not argument.startswith("-"))


def command() -> None:
    """Run the command line."""
    main()
