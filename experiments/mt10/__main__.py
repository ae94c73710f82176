"""Put the evaluations of MT10 runs into ``settings.csv``, and print who is how far by then.

    python -m experiments.mt10 runs/<runs> ...

Settings are the options that differ from ``env=mt10`` alone; what all runs have in common is left out. Runs that
were stopped count as far as they came.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import cast

from experiments.results import Row, average, grouped, markdown, number, write_csv
from varshare_rl.cli import compose
from varshare_rl.config import TrainConfig, fixed_options, load_config
from varshare_rl.reporting.run_records import find_runs

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


def options(config: TrainConfig) -> set[str]:
    """Return the options that differ from those of ``env=mt10`` alone, as words."""
    base = fixed_options(cast(TrainConfig, compose("train", ["env=mt10"])))
    given = fixed_options(config).items()
    differing = {f"{name}={value}" for name, value in given if base.get(name, value) != value}
    of_popart = {"algorithm.reward_scale=none"} if config.critic.popart else set()  # what null means there
    return {word for word in differing if word.partition("=")[0] not in INDIFFERENT} - of_popart


def rows_of(run_dir: Path, words: set[str], seed: int) -> list[Row]:
    """Return one row for every evaluation of a run; the columns of the tasks are their returns."""
    rows: list[Row] = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "eval/mean_success" not in record:
            continue
        returns = {task: round(record[f"eval/{task}/return"], 1) for task in TASKS}
        rows.append(
            {
                "setting": " ".join(sorted(words)) or "env=mt10",
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
    runs = [(run, load_config(run / "config.yaml")) for run in find_runs(given.runs)]
    words = [options(config) for _, config in runs]
    common = set.intersection(*words) if len(words) > 1 else set()
    rows = [
        row
        for (run, config), found in zip(runs, words, strict=True)
        for row in rows_of(run, found - common, config.seed)
        if number(row, "transitions") > 0
    ]
    rows.sort(key=lambda row: (str(row["setting"]), number(row, "seed"), number(row, "transitions")))
    write_csv(given.folder / "settings.csv", COLUMNS, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
