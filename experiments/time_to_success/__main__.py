"""Train until the tasks are solved, and say how long that took: ``python -m experiments.time_to_success``.

    python -m experiments.time_to_success                         # four tasks, three ways, one seed: hours
    python -m experiments.time_to_success --lists mt10 --seeds 0 1

Takes its turn behind everything else on the machine (``nice``), goes on with what was stopped when it is called
again, and ends a run at the last threshold. Writes ``times.csv`` and ``times.png``, in seconds of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import EngFormatter

import varshare_rl as vs
from experiments.results import logged, write_csv
from varshare_rl.files import write_atomically
from varshare_rl.reporting.figures import legend_below, new_figure, plain_axes, styled, to_file
from varshare_rl.reporting.style import PAGE, look
from varshare_rl.run.evaluation import Evaluation

#: Mean success over the tasks, of as many goals of each as ``evaluate.episodes`` says.
THRESHOLDS = (0.5, 0.8, 0.9, 0.97)
LISTS: Mapping[str, tuple[str, ...]] = {
    "four": (
        "env=metaworld", "env.tasks=[reach-v3,drawer-close-v3,button-press-topdown-v3,window-open-v3]",
        "total_transitions=4000000", "evaluate.every=40000",
    ),
    "mt10": ("env=mt10", "total_transitions=20000000", "evaluate.every=200000"),
}  # fmt: skip
WAYS: Mapping[str, tuple[str, ...]] = {
    "PPO, VarShare-LoRA": ("algorithm=ppo", "network=varshare_lora"),
    "PPO, shared": ("algorithm=ppo", "network=shared"),
    "SAC, VarShare-LoRA": ("algorithm=sac", "network=varshare_lora"),
}
COLUMNS = (
    "tasks", "way", "seed",
    *(f"{what}_{threshold:g}" for threshold in THRESHOLDS for what in ("transitions", "seconds")),
    "transitions", "seconds", "best_success", "git_commit",
)  # fmt: skip
Row = dict[str, object]
#: Transitions, seconds and mean success of every evaluation.
Curve = list[tuple[int, float, float]]


def curve(run_dir: Path) -> Curve:
    """The evaluations of a run; seconds include those before it was stopped and went on."""
    lines = logged(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return [
        (line["transitions"], line["seconds"], line["eval/mean_success"])
        for line in lines
        if "eval/mean_success" in line
    ]


def train(run_dir: Path, overrides: Sequence[str]) -> None:
    """Train, or go on, until the last threshold is reached or the budget is spent."""

    def go_on(transitions: int, evaluation: Evaluation) -> bool:
        success = evaluation.mean("success")
        return success is None or success < THRESHOLDS[-1]

    if all(success < THRESHOLDS[-1] for _, _, success in curve(run_dir)):
        vs.train(
            *overrides,
            "resume=auto",
            f"run_dir={run_dir}",
            "evaluate.episodes=10",
            "log.quiet=true",
            on_evaluate=go_on,
        )


def times(run_dir: Path) -> Row:
    """When each threshold was first reached; empty where it was not."""
    found = curve(run_dir)
    row: Row = {}
    for threshold in THRESHOLDS:
        first = next(((at, seconds) for at, seconds, success in found if success >= threshold), ("", ""))
        row[f"transitions_{threshold:g}"], row[f"seconds_{threshold:g}"] = first
    row["transitions"], row["seconds"] = found[-1][:2]
    row["best_success"] = max(success for _, _, success in found)
    row["git_commit"] = json.loads((run_dir / "summary.json").read_text())["conditions"]["git_commit"]
    return row


def table(rows: Sequence[Row]) -> str:
    """Minutes and transitions to every threshold, as Markdown."""
    heads = [f"{threshold:g}" for threshold in THRESHOLDS]
    lines = ["| tasks | way | seed | " + " | ".join(heads) + " | best |", "|---" * (4 + len(heads)) + "|"]
    for row in rows:
        cells = []
        for head in heads:
            seconds, transitions = row[f"seconds_{head}"], row[f"transitions_{head}"]
            reached = seconds != ""
            cells.append(f"{float(str(seconds)) / 60:.0f} min, {int(str(transitions)):,}" if reached else "-")
        cells.append(f"{row['best_success']} after {int(str(row['transitions'])):,}")
        lines.append(f"| {row['tasks']} | {row['way']} | {row['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@styled
def draw(runs: Mapping[tuple[str, str, int], Path], target: Path) -> None:
    """Mean success against hours, a panel per list of tasks and a line per run."""
    lists, ways = list(dict.fromkeys(name for name, _, _ in runs)), list(dict.fromkeys(way for _, way, _ in runs))
    figure = new_figure(PAGE, 2.8)
    panels = figure.subplots(1, len(lists), squeeze=False)[0]
    lines = {}
    for (name, way, _), run_dir in runs.items():
        points = [(seconds / 3600, success) for _, seconds, success in curve(run_dir)]
        (lines[way],) = panels[lists.index(name)].plot(*zip(*points, strict=True), **look(ways.index(way)).line)
    for axes, name in zip(panels, lists, strict=True):
        axes.set(title=name, xlabel="hours", ylabel="mean success", ylim=(-0.02, 1.02))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        plain_axes(axes, grid="y")
    legend_below(figure, list(lines.values()), list(lines))
    write_atomically(target, to_file(figure))


def main() -> None:
    """Train all that is missing, one run after the other, and write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="options of all runs, such as total_transitions=100000")
    parser.add_argument("--lists", nargs="*", default=["four"], choices=list(LISTS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/time_to_success"))
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    os.nice(10)
    rows, runs = [], dict[tuple[str, str, int], Path]()
    for seed in given.seeds:
        for name in given.lists:
            for way in given.ways:
                run_dir = given.runs / f"{name}_{way.replace(', ', '_')}_{seed}"
                options = dict(word.split("=", 1) for word in (*LISTS[name], *WAYS[way], *given.overrides))
                train(run_dir, [f"{key}={value}" for key, value in options.items()] + [f"seed={seed}"])
                rows.append({"tasks": name, "way": way, "seed": seed, **times(run_dir)})
                runs[name, way, seed] = run_dir
                write_csv(given.folder / "times.csv", COLUMNS, rows)
                draw(runs, given.folder / "times.png")
    print(table(rows))


if __name__ == "__main__":
    main()
