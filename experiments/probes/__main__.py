"""Put the curves of single-task runs into ``curves.csv``, and write ``probes.png`` and a table from it.

    python -m experiments.probes runs/<probes> ...
    python -m experiments.probes runs/<runs> --folder <folder> --base env=mt3 ...  # another base

Runs that were stopped count as far as they came. A run replaces an earlier one of its task, setting and seed;
without runs, figure and table are those of ``curves.csv``.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from matplotlib.ticker import EngFormatter

from experiments.results import changes, logged, write_csv
from varshare_rl.config import load_config
from varshare_rl.files import write_atomically
from varshare_rl.reporting.figures import legend_below, new_figure, plain_axes, styled, to_file
from varshare_rl.reporting.run_records import runs_named
from varshare_rl.reporting.style import PAGE, look

#: The setting that the others depart from.
BASE = (
    "env=metaworld", "env.tasks=[pick-place-v3]", "env.envs_per_task=10", "env.workers=1", "algorithm=ppo",
    "network=shared", "network.hidden=[128,128]", "critic=popart_layer_norm", "algorithm.reward_scale=none",
    "algorithm.rollout_transitions_per_task=5000", "algorithm.minibatches=16", "algorithm.gae_lambda=0.97",
    "algorithm.policy=clipped_gaussian", "algorithm.initial_log_std=-0.5", "algorithm.max_log_std=0",
    "algorithm.min_observation_std=0.05", "algorithm.target_kl=0.05", "total_transitions=2000000",
    "algorithm.observation_statistics=running", "env.staggered_resets=false", "algorithm.noise_correlation=0",
    "elbo.temperature=1",
)  # fmt: skip
#: Columns by what they are called in ``metrics.jsonl``: of evaluations, and of the episodes of training.
MEASURES = {
    "success": "eval/{}/success",
    "return": "eval/{}/return",
    "train_success": "train/{}/success",
    "train_return": "train/{}/return",
}
COLUMNS = ("task", "setting", "seed", "transitions", *MEASURES, "seconds")
#: Options that no learning of a single task depends on.
INDIFFERENT = ("env.tasks", "seed", "env.workers", "plugins")
#: A task is learnt when an evaluation has so much success.
LEARNT = 0.9

Row = Mapping[str, str]
Probe = tuple[str, str, str]  # task, setting, seed


def rows_of(run_dir: Path, base: Sequence[str]) -> list[Row]:
    """Return what a run has logged of each task, a row for every moment; transitions are those of a task."""
    config = load_config(run_dir / "config.yaml")
    words, tasks = " ".join(changes(config, base, INDIFFERENT)) or "base", config.env.tasks
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for record in logged(run_dir):
        transitions = int(record["transitions"]) // len(tasks)
        for task, (column, name) in product(tasks, MEASURES.items()):
            if (value := record.get(name.format(task))) is not None:
                row = {"task": task, "setting": words, "seed": str(config.seed), "transitions": str(transitions)}
                row["seconds"] = f"{record['seconds']:.0f}"
                rows.setdefault((task, transitions), row)[column] = f"{value:.2f}"
    return list(rows.values())


def by_probe(rows: Sequence[Row]) -> dict[Probe, list[Row]]:
    """Return the rows of every run, in order of transitions."""
    found: dict[Probe, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: int(row["transitions"])):
        found[row["task"], row["setting"], row["seed"]].append(row)
    return dict(sorted(found.items()))


def values(rows: Sequence[Row], column: str) -> tuple[list[int], list[float]]:
    """Return the moments that a column has values at, and these."""
    found = [(int(row["transitions"]), float(row[column])) for row in rows if row.get(column)]
    return [at for at, _ in found], [value for _, value in found]


@styled
def draw(path: Path, probes: Mapping[Probe, Sequence[Row]]) -> None:
    """A column of panels per task, success and return: lines of training, dots of evaluations."""
    tasks = list(dict.fromkeys(task for task, _, _ in probes))
    settings = list(dict.fromkeys(words for _, words, _ in probes))
    figure = new_figure(PAGE, 4.2 + 0.16 * len(settings))
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex=True)
    lines = {}
    for (task, words, _), rows in probes.items():
        seen = look(settings.index(words))
        for axis, measure in zip(axes[:, tasks.index(task)], ("success", "return"), strict=True):
            (lines[words],) = axis.plot(*values(rows, f"train_{measure}"), **seen.line)
            axis.scatter(*values(rows, measure), s=14, color=seen.colour, marker=seen.marker)
    for column, task in enumerate(tasks):
        axes[0][column].set(title=task, ylim=(-0.03, 1.03))
        axes[1][column].set(xlabel="transitions")
        for axis in axes[:, column]:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            plain_axes(axis, grid="y")
    axes[0][0].set_ylabel("success")
    axes[1][0].set_ylabel("return")
    legend_below(figure, list(lines.values()), list(lines))
    write_atomically(path, to_file(figure))


def print_table(probes: Mapping[Probe, Sequence[Row]]) -> None:
    """Print what became of every run as a Markdown table."""
    columns = (
        "task", "setting", "seed", "transitions", "best success", "best return", "best return in training",
        f"success {LEARNT:g} at",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for (task, words, seed), rows in probes.items():
        (moments, success), (_, returns) = values(rows, "success"), values(rows, "return")
        trained = max(values(rows, "train_return")[1], default=0.0)
        reached = next((f"{at:,}" for at, value in zip(moments, success, strict=True) if value >= LEARNT), "")
        best = f"{max(success, default=0.0):.2f} | {max(returns, default=0.0):,.0f} | {trained:,.0f}"
        print(f"| {task} | `{words}` | {seed} | {int(rows[-1]['transitions']):,} | {best} | {reached} |")


def main() -> None:
    """Collect what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.probes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", help="run folders, or folders that hold them")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the results go")
    parser.add_argument("--base", nargs="+", default=BASE, help="overrides of the setting that others depart from")
    given = parser.parse_args()
    table = given.folder / "curves.csv"
    kept: list[Row] = list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []
    new = [row for run in (runs_named(given.runs) if given.runs else []) for row in rows_of(run, given.base)]
    probes = {**by_probe(kept), **by_probe(new)}
    if not probes:
        raise SystemExit("error: no runs are given and there is no curves.csv; give folders of runs")
    probes = dict(sorted(probes.items()))
    write_csv(table, COLUMNS, [dict(row) for rows in probes.values() for row in rows])
    draw(given.folder / "probes.png", probes)
    print_table(probes)


if __name__ == "__main__":
    main()
