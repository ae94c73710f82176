"""Compare runs: a page with figures, tables and what differs between them; seeds of one configuration are pooled.

    python -m varshare_rl.report compare runs/<a> runs/<b> runs/<sweep> 'runs/mt10_*'

    <folders>          run folders, patterns of them, or folders that hold them, such as sweeps (needed)
    out=report_compare the folder for report.html, figures, CSV and LaTeX
    at=null            transitions after which runs are compared; null: at the end of each
    measure=null       success, success_final or return; null: success where all runs have it, else return
    evaluation=false   true: final scores from evaluation.json, which `evaluate` writes

What is in it, and how to read it: docs/reports.md. Needs the extra `report`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from varshare_rl.commands.common import ReportConfig, make_folder
from varshare_rl.config import TrainConfig, flat_options, load_config
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded, option_sentence
from varshare_rl.files import write_atomically
from varshare_rl.registry import register
from varshare_rl.reporting.run_records import MEASURES, RunRecord, read_record, runs_named
from varshare_rl.run.console import PLAIN_WIDTH
from varshare_rl.run_files import CONFIG_FILE

if TYPE_CHECKING:
    from varshare_rl.reporting.comparison import Section


@register("report", "compare")
@dataclass
class CompareReportConfig(ReportConfig):
    """Options of ``report compare``; runs are plain arguments."""

    needed: ClassVar[Mapping[str, str]] = {}
    takes_folders: ClassVar[bool] = True

    out: str = "report_compare"
    "Folder for the report."
    at: int | None = bounded(None, least=1)
    "Transitions after which runs are compared, at the last evaluation by then; null: at the end of each."
    measure: str | None = None
    "`success`, `success_final` or `return`; null: success where all runs on the same tasks have it, else return."
    evaluation: bool = False
    "Final scores from `evaluation.json`, which `evaluate` writes, instead of the last evaluation in training."

    def build(self, folders: Sequence[str]) -> None:
        """Write ``report.html``, figures, and the numbers as CSV and LaTeX."""
        if not folders:
            raise UserError("no runs to compare; give their folders: report compare runs/<a> runs/<b>")
        if self.measure not in (None, *MEASURES):
            raise UserError(f"measure is {self.measure!r}; choose {', '.join(MEASURES)}, or leave it out")
        if self.evaluation and self.at is not None:
            raise UserError("at= compares in the course of training, evaluation=true after it; give one of them")
        report_compare(self, folders)


def report_compare(options: CompareReportConfig, folders: Sequence[str]) -> None:
    """Compare the runs in ``folders``, write the report, and show its numbers."""
    runs, configs, left_out = read_runs(runs_named(folders), options.evaluation)
    if not runs:
        raise UserError(f"no run can be compared: {left_out[0]}")
    from varshare_rl.reporting.comparison import compare_runs  # takes a while to import: after what can be wrong

    def sentence(name: str) -> str:
        return next((said for config in configs if (said := option_sentence(config, name))), "")

    sections = compare_runs(runs, sentence, options.at, options.measure)
    out = Path(options.out)
    chosen = [
        f"{option.name}={str(value).lower() if isinstance(value, bool) else value}"
        for option in fields(options)
        if (value := getattr(options, option.name)) != option.default
    ]
    write_report(out, sections, left_out, ["compare", *folders, *chosen])
    show(sections, left_out, out)


def read_runs(
    folders: Sequence[Path], evaluation: bool = False
) -> tuple[list[RunRecord], list[TrainConfig], list[str]]:
    """Read run folders; also their configurations, and a line for each that cannot be read."""
    runs, configs, left_out = [], [], []
    for folder in folders:
        try:
            config = load_config(folder / CONFIG_FILE)
            runs.append(read_record(folder, flat_options(config), evaluation))
            configs.append(config)
        except UserError as error:
            left_out.append(str(error))
    return runs, configs, left_out


def write_report(out: Path, sections: Sequence[Section], left_out: Sequence[str], given: Sequence[str]) -> None:
    """Write figures as PNG, SVG and PDF, tables as CSV and LaTeX, and the page that has them all."""
    from varshare_rl.reporting import comparison_tables as tables
    from varshare_rl.reporting.comparison_figures import comparison_figures, group_looks
    from varshare_rl.reporting.figures import to_file
    from varshare_rl.reporting.page import file_names, page

    looks = group_looks(sections)
    figures = [comparison_figures(section, looks) for section in sections]
    pictures = [{name: to_file(figure, "svg") for name, figure in made.items()} for made in figures]
    make_folder(out / "figures")
    for name, made, drawn in zip(file_names(sections), figures, pictures, strict=True):
        for figure in made:
            path = out / "figures" / f"{name}_{figure}"
            write_atomically(path.with_name(f"{path.name}.svg"), drawn[figure])
            write_atomically(path.with_name(f"{path.name}.png"), to_file(made[figure], "png"))
            write_atomically(path.with_name(f"{path.name}.pdf"), to_file(made[figure], "pdf"))
    write_atomically(out / "groups.csv", tables.to_csv(tables.group_rows(sections)))
    write_atomically(out / "scores.csv", tables.to_csv(tables.score_rows(sections)))
    write_atomically(out / "improvement.csv", tables.to_csv(tables.improvement_rows(sections)))
    write_atomically(out / "groups.tex", tables.to_latex(sections))
    write_atomically(out / "report.html", page(sections, looks, pictures, left_out, given))


def show(sections: Sequence[Section], left_out: Sequence[str], out: Path) -> None:
    """Print the statistics of every group, what stands in the way of comparing them, and where the report is."""
    terminal = sys.stdout.isatty()
    console = Console(highlight=False, width=None if terminal else PLAIN_WIDTH, force_terminal=terminal)
    for section in sections:
        console.print(_table(section))
        for warning in section.warnings:
            console.print(Text(f"warning: {warning}"))
    for line in left_out:
        console.print(Text(f"left out: {line}"))
    console.print(Text(f"95 % stratified bootstrap intervals; written: {out / 'report.html'}"))


def _table(section: Section) -> Table:
    table = Table(
        title=Text(f"{section.name}: {section.measure} {section.moment}"), title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("group", overflow="fold")
    for name in ("runs", "IQM", "mean", "worst task"):
        table.add_column(name, justify="right")
    for group in section.groups:
        found: list[Any] = [group.statistics.get(name) for name in ("iqm", "mean", "worst_1")]
        cells = ["-" if interval is None else interval.text(section.digits) for interval in found]
        cells[1:] = [cell.partition(" (")[0] for cell in cells[1:]]
        table.add_row(Text(group.label), str(len(group.scored)), *cells)
    return table
