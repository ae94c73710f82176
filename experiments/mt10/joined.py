"""Join runs of MT10 that begin where one another stood: ``python -m experiments.mt10.joined runs/<runs> ...``.

Writes ``joined.csv``, success and return of every task at every evaluation, each run's until the next one begins,
and ``joined.png``: mean success, and that of the tasks that were solved last.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import EngFormatter

from experiments.mt10.__main__ import TASKS
from experiments.results import Row, logged, number, write_csv
from varshare_rl.files import write_atomically
from varshare_rl.reporting.figures import legend_below, new_figure, plain_axes, styled, to_file
from varshare_rl.reporting.style import INK, PAGE, look

COLUMNS = ("run", "transitions", "success", *(f"{task}_{what}" for task in TASKS for what in ("success", "return")))
#: Tasks that a figure shows by themselves.
SHOWN = 3


def rows_of(runs: Sequence[Path]) -> list[Row]:
    """Return a row for every evaluation of the runs in order; where one begins, the evaluations before it end."""
    rows: list[Row] = []
    for run in runs:
        records = [record for record in logged(run) if "eval/mean_success" in record]
        rows = [row for row in rows if number(row, "transitions") < records[0]["transitions"]]
        for record in records:
            each = {
                f"{task}_{what}": round(record[f"eval/{task}/{what}"], 2)
                for task in TASKS
                for what in ("success", "return")
            }
            success = round(record["eval/mean_success"], 3)
            rows.append({"run": run.name, "transitions": record["transitions"], "success": success, **each})
    return rows


@styled
def draw(rows: Sequence[Row], target: Path) -> None:
    """Draw mean success, and that of the ``SHOWN`` tasks with the least of it over all evaluations."""
    figure = new_figure(PAGE, 3.0)
    axes = figure.subplots()
    at = [number(row, "transitions") for row in rows]
    lines = axes.plot(at, [number(row, "success") for row in rows], color=INK, linewidth=2.4)
    last = sorted(TASKS, key=lambda task: sum(number(row, f"{task}_success") for row in rows))[:SHOWN]
    for place, task in enumerate(last):
        lines += axes.plot(at, [number(row, f"{task}_success") for row in rows], **look(place).line)
    for run in dict.fromkeys(str(row["run"]) for row in rows):
        begins = min(number(row, "transitions") for row in rows if row["run"] == run)
        if begins:
            axes.axvline(begins, color=INK, linewidth=0.6, linestyle=":")
    axes.set(xlabel="transitions, all tasks together", ylabel="success", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    plain_axes(axes, grid="y")
    legend_below(figure, lines, ["mean of ten tasks", *last])
    write_atomically(target, to_file(figure))


def main() -> None:
    """Join the runs that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.mt10.joined",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, in order")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where table and figure go")
    given = parser.parse_args()
    rows = rows_of(given.runs)
    write_csv(given.folder / "joined.csv", COLUMNS, rows)
    draw(rows, given.folder / "joined.png")


if __name__ == "__main__":
    main()
