"""``python -m experiments.defaults runs/<sweep> ...``: runs that differ from the defaults in an option, as tables.

Writes ``defaults.csv``, one line per run, and prints a table for every suite: means over seeds, those that learn
first at the top. What all runs of a suite have in common, such as its budget, is no change.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import cast

from experiments.curves import read_curves
from experiments.results import (
    Row,
    average,
    changes,
    finished_runs,
    grouped,
    markdown,
    number,
    without_common,
    write_csv,
)
from varshare_rl.assemble import load_agent
from varshare_rl.config import Device, TrainConfig
from varshare_rl.nn.parameters import total_kl

COLUMNS = ("suite", "changed", "seed", "success", "area", "nats", "critic_nats", "transitions", "git_commit")
#: Options that are not what is compared.
INDIFFERENT = ("seed", "env.tasks", "plugins")


def changed(config: TrainConfig) -> list[str]:
    """Return the options that differ from the defaults of its suite and algorithm, as words."""
    words = [f"env={config.env.name}", f"algorithm={config.algorithm.name}"]
    follows = {"network.hidden"} if config.network.active_parameters is not None else set()
    return changes(config, words, {*INDIFFERENT, *follows})


def read(run_dir: Path) -> Row:
    """One row of the table; ``area`` is the mean success of the evaluations on the way."""
    agent = load_agent(run_dir, "last", Device.cpu)
    summary = json.loads((run_dir / "summary.json").read_text())
    curve = [success for _, success in read_curves(run_dir, "success")["mean"]]
    nats = {
        name: float(total_kl(module, len(agent.suite.task_names)).detach().mean())
        for name, module in agent.algorithm.trained_modules().items()
    }
    return {
        "suite": agent.config.env.name,
        "changed": changed(agent.config),
        "seed": agent.config.seed,
        "success": round(summary["mean_success"], 4),
        "area": round(mean(curve), 4),
        "nats": round(nats["actor"], 2),
        "critic_nats": round(nats["critic"], 2),
        "transitions": summary["transitions"],
        "git_commit": summary["conditions"]["git_commit"],
    }


def name_changes(rows: list[Row]) -> None:
    """Make one text of every row's changes, without those that all rows of its suite share."""
    for suite in {row["suite"] for row in rows}:
        members = [row for row in rows if row["suite"] == suite]
        names = without_common([cast("list[str]", row["changed"]) for row in members], "the defaults")
        for row, name in zip(members, names, strict=True):
            row["changed"] = name


def table(rows: list[Row]) -> str:
    """Means over seeds as Markdown."""
    lines = []
    for (name,), members in sorted(grouped(rows, "changed").items(), key=lambda pair: -average(pair[1], "area")):
        success = [number(member, "success") for member in members]
        lines.append(
            (
                f"`{name}`",
                f"{len(members)}",
                f"{mean(success):.2f} ({min(success):.2f} to {max(success):.2f})",
                f"{average(members, 'area'):.3f}",
                f"{average(members, 'nats'):,.0f}",
                f"{average(members, 'critic_nats'):,.0f}",
            )
        )
    return markdown(("changed", "seeds", "success (of seeds)", "on the way", "policy, nats", "critic, nats"), lines)


def main() -> None:
    """Read all runs, and write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of sweeps")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    rows = [read(run_dir) for run_dir in finished_runs(given.folders)]
    name_changes(rows)
    rows.sort(key=lambda row: (str(row["suite"]), str(row["changed"]), number(row, "seed")))
    write_csv(given.folder / "defaults.csv", COLUMNS, rows)
    for (suite,), members in grouped(rows, "suite").items():
        print(f"\n{suite}\n\n{table(members)}")


if __name__ == "__main__":
    main()
