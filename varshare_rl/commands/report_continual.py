"""Compare continual-learning methods over seeds: tables, continual.json, continual.csv and figures.

    python -m varshare_rl.report continual runs/<a> runs/<b> reference=runs/<single tasks>

    <folders>          runs, or folders of several, such as sweeps (needed)
    reference=null     a folder, or a list, of single tasks learnt from scratch, for forward transfer
    out=null           the folder for the report; null: <run>/report_continual for one run, else report_continual

What the measures mean: docs/continual.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from varshare_rl.commands.common import ReportConfig, make_folder, output_folder
from varshare_rl.errors import UserError
from varshare_rl.files import write_atomically, write_json
from varshare_rl.registry import register
from varshare_rl.reporting.continual_measures import measures, pooled_reference
from varshare_rl.reporting.continual_runs import (
    ContinualRun,
    check_comparable,
    check_references,
    read_continual_runs,
)
from varshare_rl.reporting.statistics import FEW_RUNS
from varshare_rl.run.console import PLAIN_WIDTH


@register("report", "continual")
@dataclass
class ContinualReportConfig(ReportConfig):
    """Options of ``report continual``; runs are plain arguments."""

    needed: ClassVar[Mapping[str, str]] = {}
    takes_folders: ClassVar[bool] = True

    reference: Any = None
    "Folder, or list of folders, of single tasks learnt from scratch."
    out: str | None = None
    "Folder for the report; null: `<run>/report_continual` for one run, else `report_continual`."

    def build(self, folders: Sequence[str]) -> None:
        """Compare methods over seeds: ``continual.json``, ``continual.csv`` and figures."""
        report_continual(self, folders)


def report_continual(options: ContinualReportConfig, folders: Sequence[str]) -> None:
    """Compare methods over seeds: ``continual.json``, ``continual.csv`` and figures, and figures of every run."""
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
    alone = pooled_reference([reference.document for reference in references]) if references else None
    found = [measures(document, alone) for document in documents]
    rows = compare(labels, documents, found)
    default = runs[0].folder / "report_continual" if len(runs) == 1 else Path("report_continual")
    out = output_folder(options.out, default)
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
    Console(
        highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH, force_terminal=sys.stdout.isatty()
    ).print(*screen_tables(rows, found[0]["measure"]))
    few = any(1 < len(row["seeds"]) <= FEW_RUNS for row in rows)
    doubt = " (of three seeds or fewer too narrow)" * few
    print(f"mean over seeds, 95 % bootstrap interval below{doubt}; written: {out}")


def reference_folders(given: Any) -> list[str]:
    """Return the folders of ``reference=``, which takes one or a list."""
    folders = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders):
        raise UserError(f"reference is {given!r}; give a folder of runs, or a list of them")
    return folders


def write_continual(out: Path, runs: Sequence[ContinualRun], document: dict[str, Any]) -> None:
    """Write the comparison, and the figures of every run, in folders of their own where there are several."""
    from varshare_rl.reporting.continual_figures import comparison_figures, run_figures
    from varshare_rl.reporting.continual_table import to_csv
    from varshare_rl.reporting.figures import to_file

    labels = [run["label"] for run in document["runs"]]
    compared = comparison_figures(document["methods"], document["measure"], labels, [run.document for run in runs])
    figures = {out / name: made for name, made in compared.items()}
    for run, name in zip(runs, run_names(runs), strict=True):
        figures |= {out / name / figure: made for figure, made in run_figures(run.document).items()}
    for path, figure in figures.items():
        make_folder(path.parent)
        write_atomically(path.with_name(f"{path.name}.png"), to_file(figure))
    write_atomically(out / "continual.csv", to_csv(document["methods"]))
    write_json(out / "continual.json", document)


def run_names(runs: Sequence[ContinualRun]) -> list[str]:
    """Return what sets the paths of runs apart, as names of folders; that of a single run is empty."""
    if len(runs) == 1:
        return [""]
    folders = [run.folder.resolve() for run in runs]
    common = Path(os.path.commonpath(folders))
    return ["_".join(folder.relative_to(common).parts) for folder in folders]
