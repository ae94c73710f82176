"""From run folders to rows, intervals, a table and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.architectures.grid import NETWORKS, SUITES
from experiments.results import finished_runs
from varshare_rl.config import load_config
from varshare_rl.errors import UserError
from varshare_rl.files import write_atomically
from varshare_rl.reporting.figures import new_figure, plain_axes, styled, to_file
from varshare_rl.reporting.statistics import mean_interval
from varshare_rl.reporting.style import PAGE, QUALITATIVE

COLUMNS = (
    "suite", "network", "seed", "success", "per_task", "return", "hidden", "stored", "active", "transitions",
    "seconds", "git_commit",
)  # fmt: skip

Row = dict[str, Any]
#: (suite, network) to median, lower and upper quartile of an update's time over that of ``shared``.
Times = Mapping[tuple[str, str], tuple[float, float, float]]


def read(run_dir: Path) -> Row:
    """One row of the CSV from a run folder."""
    config = load_config(run_dir / "config.yaml")
    summary = json.loads((run_dir / "summary.json").read_text())
    if summary["mean_success"] is None:
        raise UserError(f"{run_dir} is of a suite without successes ({config.env.name}); leave it out")
    return {
        "suite": config.env.name,
        "network": config.network.name,
        "seed": config.seed,
        "success": round(summary["mean_success"], 4),
        "per_task": " ".join(f"{name}={task['success']:g}" for name, task in summary["tasks"].items()),
        "return": round(summary["mean_return"], 3),
        "hidden": "x".join(str(width) for width in config.network.hidden),
        "stored": summary["parameters"]["stored"],
        "active": summary["parameters"]["active_per_task"],
        "transitions": summary["transitions"],
        "seconds": round(summary["seconds"]),
        "git_commit": summary["conditions"]["git_commit"],
    }


def collect(sweeps: Sequence[Path]) -> list[Row]:
    """Rows of all finished runs below the folders, in the order of the grid.

    Raises:
        UserError: there is none, two runs are of the same suite, network and seed, or those of one suite were
            trained for different numbers of transitions.
    """
    found: dict[tuple[str, str, int], Path] = {}
    rows: list[Row] = []
    for run_dir in finished_runs(sweeps):
        row = read(run_dir)
        key = row["suite"], row["network"], row["seed"]
        if key in found:
            name = "suite {}, network {}, seed {}".format(*key)
            raise UserError(f"{found[key]} and {run_dir} are both {name}; leave one of them out")
        found[key] = run_dir
        rows.append(row)
    if not rows:
        raise UserError("no finished run in these folders; give folders of sweeps")
    for suite in {row["suite"] for row in rows}:
        budgets = sorted({row["transitions"] for row in rows if row["suite"] == suite})
        if len(budgets) > 1:
            raise UserError(
                f"runs of {suite} have {budgets[0]} to {budgets[-1]} transitions; give those of one budget"
            )
    suites, networks = list(SUITES), list(NETWORKS)
    return sorted(
        rows, key=lambda row: (_place(row["suite"], suites), _place(row["network"], networks), row["seed"])
    )


def _place(name: str, names: list[str]) -> tuple[int, str]:
    return (names.index(name) if name in names else len(names), name)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean over runs; of one run, that run."""
    found = mean_interval(values)
    return (found.point, found.point) if found.low is None or found.high is None else (found.low, found.high)


def groups(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by suite and network, in their order."""
    made: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        made.setdefault(row["suite"], {}).setdefault(row["network"], []).append(row)
    return made


def hardest(group: Sequence[Row]) -> tuple[float, str]:
    """The least success of a task, averaged over runs, and the task."""
    tasks: dict[str, list[float]] = {}
    for row in group:
        for name, _, success in (entry.rpartition("=") for entry in row["per_task"].split(" ")):
            tasks.setdefault(name, []).append(float(success))
    return min((mean(values), name) for name, values in tasks.items())


def read_times(path: Path) -> Times:
    """What ``time`` has written; nothing where it has not been run."""
    if not path.exists():
        return {}
    rows = [row for section in json.loads(path.read_text())["sections"] for row in section["ratios"]]
    times = {_pair(row["name"]): (row["median"], row["low"], row["high"]) for row in rows}
    return times | {_pair(row["against"]): (1.0, 1.0, 1.0) for row in rows}


def _pair(name: str) -> tuple[str, str]:
    suite, _, network = name.partition(" ")
    return suite, network


def table(rows: Sequence[Row], times: Times) -> list[str]:
    """Markdown, one table per suite."""
    lines: list[str] = []
    for suite, networks in groups(rows).items():
        lines += ["", f"### {suite}, {rows_of(networks)[0]['transitions']:,} transitions", ""]
        lines.append("| `network=` | seeds | success (95 %) | hardest task | hidden | active | stored | update |")
        lines.append("|---|---|---|---|---|---|---|---|")
        for network, group in networks.items():
            values = [row["success"] for row in group]
            low, high = interval(values)
            least, task = hardest(group)
            first = group[0]
            ratio = times.get((suite, network))
            update = "" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*ratio)
            lines.append(
                f"| `{network}` | {len(group)} | {mean(values):.3f} ({low:.3f} to {high:.3f}) | {least:.2f} {task} "
                f"| {first['hidden']} | {first['active']:,} | {first['stored']:,} | {update} |"
            )
    return lines[1:]


def rows_of(networks: Mapping[str, list[Row]]) -> list[Row]:
    """All rows of a suite."""
    return [row for group in networks.values() for row in group]


@styled
def draw(path: Path, rows: Sequence[Row]) -> None:
    """One panel per suite: a line per architecture with mean and interval, and a dot for every run."""
    suites = groups(rows)
    most = max(len(networks) for networks in suites.values())
    figure = new_figure(PAGE, 0.8 + 0.22 * most)
    for axes, (suite, networks) in zip(
        figure.subplots(1, len(suites), squeeze=False)[0], suites.items(), strict=True
    ):
        for line, group in enumerate(networks.values()):
            values = [row["success"] for row in group]
            axes.plot(interval(values), [line, line], color=QUALITATIVE[0], linewidth=1.8)
            axes.plot(mean(values), line, "o", color=QUALITATIVE[0], markersize=5)
            axes.plot(values, [line + 0.25] * len(values), ".", color=QUALITATIVE[1], markersize=4)
        axes.set_yticks(range(len(networks)), list(networks))
        axes.set_ylim(len(networks) - 0.4, -0.6)
        axes.set(xlim=(-0.02, 1.02), xlabel="mean success", title=suite)
        plain_axes(axes, grid="both")
    write_atomically(path, to_file(figure))
