"""Train until the tasks are solved, and say how long that took: ``python -m experiments.time_to_success``.

    python -m experiments.time_to_success                         # four tasks, three ways, one seed: hours
    python -m experiments.time_to_success --lists mt10 --seeds 0 1
    python -m experiments.time_to_success --given "ours=runs/a+runs/b" "one network=runs/c"     # nothing is trained

``--given`` measures runs that are there; ``+`` joins one and another that began where it stood. Training takes its
turn behind everything else on the machine (``nice``), goes on with what was stopped when it is called again, and
ends a run at the last threshold. Both write ``times.csv`` and ``times.png``, in seconds of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
#: The folders of a way to success, each of a run that goes on from the one before, by list, way and seed.
Runs = dict[tuple[str, str, int], tuple[Path, ...]]


def curve(*run_dirs: Path) -> Curve:
    """The evaluations of runs that go on from one another; seconds include those before one was stopped."""
    points: Curve = []
    for run_dir in run_dirs:
        lines = logged(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        own = [
            (line["transitions"], line["seconds"], line["eval/mean_success"])
            for line in lines
            if "eval/mean_success" in line
        ]
        points = [point for point in points if not own or point[0] < own[0][0]] + own
    return points


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


def times(*run_dirs: Path) -> Row:
    """When each threshold was first reached; empty where it was not."""
    found = curve(*run_dirs)
    row: Row = {}
    for threshold in THRESHOLDS:
        first = next(((at, seconds) for at, seconds, success in found if success >= threshold), ("", ""))
        row[f"transitions_{threshold:g}"], row[f"seconds_{threshold:g}"] = first
    row["transitions"], row["seconds"] = found[-1][:2]
    row["best_success"] = round(max(success for _, _, success in found), 3)
    row["git_commit"] = conditions(run_dirs[-1])["git_commit"]
    return row


def conditions(run_dir: Path) -> dict[str, Any]:
    """What a run was made under."""
    found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())["conditions"]
    return found


def runs_given(words: Sequence[str]) -> Runs:
    """The runs of ``<way>=<run>[+<run that goes on>...]``, by their suite, way and seed."""
    runs: Runs = {}
    for word in words:
        way, _, folders = word.partition("=")
        run_dirs = tuple(map(Path, folders.split("+")))
        found = conditions(run_dirs[-1])
        runs[found["suite"], way, found["seed"]] = run_dirs
    return runs


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
def draw(runs: Runs, target: Path) -> None:
    """Mean success against transitions and against minutes, a row per list of tasks and a line per run."""
    lists, ways = list(dict.fromkeys(name for name, _, _ in runs)), list(dict.fromkeys(way for _, way, _ in runs))
    figure = new_figure(PAGE, 2.8 * len(lists))
    panels = figure.subplots(len(lists), 2, squeeze=False, sharey=True)
    lines = {}
    for (name, way, _), run_dirs in runs.items():
        transitions, seconds, success = zip(*curve(*run_dirs), strict=True)
        by_transitions, by_minutes = panels[lists.index(name)]
        by_transitions.plot(transitions, success, **look(ways.index(way)).line)
        minutes = [second / 60 for second in seconds]
        (lines[way],) = by_minutes.plot(minutes, success, **look(ways.index(way)).line)
    for (by_transitions, by_minutes), name in zip(panels, lists, strict=True):
        by_transitions.set(xlabel=f"transitions, {name}", ylabel="mean success", ylim=(-0.02, 1.02))
        by_transitions.xaxis.set_major_formatter(EngFormatter(sep=""))
        by_minutes.set(xlabel="minutes")
        for axes in (by_transitions, by_minutes):
            plain_axes(axes, grid="y")
    legend_below(figure, list(lines.values()), list(lines))
    write_atomically(target, to_file(figure))


def write(runs: Runs, folder: Path) -> list[Row]:
    """Write table and figure of some runs, and return the rows."""
    rows = [
        {"tasks": name, "way": way, "seed": seed, **times(*run_dirs)}
        for (name, way, seed), run_dirs in runs.items()
    ]
    write_csv(folder / "times.csv", COLUMNS, rows)
    draw(runs, folder / "times.png")
    return rows


def main() -> None:
    """Train all that is missing, one run after the other, and write table and figure; or measure given runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="options of all runs, such as total_transitions=100000")
    parser.add_argument("--lists", nargs="*", default=["four"], choices=list(LISTS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--given", nargs="*", default=[], help="<way>=<run>[+<run that goes on>...]")
    parser.add_argument("--runs", type=Path, default=Path("runs/time_to_success"))
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    if given.given:
        print(table(write(runs_given(given.given), given.folder)))
        return
    os.nice(10)
    rows, runs = list[Row](), Runs()
    for seed in given.seeds:
        for name in given.lists:
            for way in given.ways:
                run_dir = given.runs / f"{name}_{way.replace(', ', '_')}_{seed}"
                options = dict(word.split("=", 1) for word in (*LISTS[name], *WAYS[way], *given.overrides))
                train(run_dir, [f"{key}={value}" for key, value in options.items()] + [f"seed={seed}"])
                runs[name, way, seed] = (run_dir,)
                rows = write(runs, given.folder)
    print(table(rows))


if __name__ == "__main__":
    main()
