"""Put the evaluations of MT10 runs into ``settings.csv``, and print who is how far by then.

    python -m experiments.mt10 runs/<runs> ...

Settings are the options that differ from ``env=mt10`` alone; what all runs have in common is left out. Runs that
were stopped count as far as they came.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from experiments.results import (
    Row,
    average,
    changes,
    grouped,
    logged,
    markdown,
    number,
    without_common,
    write_csv,
)
from varshare_rl.config import TrainConfig, load_config
from varshare_rl.reporting.run_records import runs_named

#: Options that are not what is compared.
INDIFFERENT = ("seed", "env.workers", "plugins")
TASKS = tuple(
    f"{task}-v3"
    for task in (
        "reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown",
        "peg-insert-side", "window-open", "window-close",
    )
)  # fmt: skip
COLUMNS = ("setting", "seed", "transitions", "seconds", "success", "return", *TASKS)


def options(config: TrainConfig) -> list[str]:
    """Return the options that differ from those of ``env=mt10`` alone, as words."""
    of_popart = {"algorithm.reward_scale=none"} if config.critic.popart else set()  # what null means there
    return sorted({*changes(config, ["env=mt10"], INDIFFERENT)} - of_popart)


def rows_of(run_dir: Path, setting: str, seed: int) -> list[Row]:
    """Return one row for every evaluation of a run but the first; the columns of the tasks are their returns."""
    rows: list[Row] = []
    for record in logged(run_dir):
        if "eval/mean_success" not in record or record["transitions"] == 0:
            continue
        returns = {task: round(record[f"eval/{task}/return"], 1) for task in TASKS}
        rows.append(
            {
                "setting": setting,
                "seed": seed,
                "transitions": record["transitions"],
                "seconds": round(record["seconds"]),
                "success": round(record["eval/mean_success"], 3),
                "return": round(mean(returns.values()), 1),
                **returns,
            }
        )
    return rows


def table(rows: list[Row]) -> str:
    """Success and return at every number of transitions, those of the highest return first; means over seeds."""
    lines = []
    for (transitions,), reached in sorted(grouped(rows, "transitions").items(), key=lambda pair: int(pair[0][0])):
        settings = grouped(reached, "setting")
        for (setting,), runs in sorted(settings.items(), key=lambda pair: -average(pair[1], "return")):
            lines.append(
                (
                    f"{int(transitions):,}",
                    f"`{setting}`",
                    f"{len(runs)}",
                    f"{average(runs, 'success'):.2f}",
                    f"{average(runs, 'return'):,.0f}",
                    f"{average(runs, 'seconds'):,.0f}",
                )
            )
    return markdown(("transitions", "setting", "seeds", "success", "return", "seconds"), lines)


def main() -> None:
    """Collect what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.mt10", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="run folders, or folders that hold them")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the table goes")
    given = parser.parse_args()
    runs = [(run, load_config(run / "config.yaml")) for run in runs_named(given.runs)]
    settings = without_common([options(config) for _, config in runs], "env=mt10")
    rows = [
        row
        for (run, config), setting in zip(runs, settings, strict=True)
        for row in rows_of(run, setting, config.seed)
    ]
    rows.sort(key=lambda row: (str(row["setting"]), number(row, "seed"), number(row, "transitions")))
    write_csv(given.folder / "settings.csv", COLUMNS, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
