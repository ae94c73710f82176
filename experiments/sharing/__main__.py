"""Tables and curves from the three sweeps that README.md names: ``results.json`` and ``nats.png``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.ticker import EngFormatter

from experiments.results import finished_runs, logged
from varshare_rl.assemble import load_agent
from varshare_rl.config import Device
from varshare_rl.files import write_atomically, write_json
from varshare_rl.reporting.figures import grid_of_panels, new_figure, plain_axes, styled, to_file
from varshare_rl.reporting.style import INK, PAGE, look
from varshare_rl.run.sharing import sharing_document

Curve = list[tuple[int, float]]
#: The budget of a run counts as held from this share of its transitions on.
SETTLED = 0.8


def nats(run: Path) -> Curve:
    """Mean nats per task against transitions, as the run logged them."""
    curve = []
    for record in logged(run):
        values = [value for name, value in record.items() if name.startswith("kl/")]
        if values and "time/updates" in record:
            curve.append((record["transitions"], mean(values)))
    return curve


def row(run: Path) -> dict[str, Any]:
    """What is reported of one run."""
    summary = json.loads((run / "summary.json").read_text())
    agent = load_agent(run, "last", Device.cpu)
    document = sharing_document(agent.algorithm.trained_modules(), agent.suite.task_names, summary["transitions"])
    curve = nats(run)
    frozen_eval = [value for at, value in curve if at >= SETTLED * summary["transitions"]]
    return {
        "seed": agent.config.seed,
        "budget_nats": getattr(agent.config.elbo.schedule, "budget_nats", None),
        "success": summary["mean_success"],
        "return": summary["mean_return"],
        "nats_at_first": curve[0][1],
        "nats_settled": mean(frozen_eval),
        "nats_by_task": {name: task["kl"] for name, task in summary["tasks"].items()},
        "nats_by_layer": {layer["name"]: mean(layer["nats"]) for layer in document["layers"]},
        "sharing": document["sharing"],
        "sharing_by_layer": {layer["name"]: layer["sharing"] for layer in document["layers"]},
        "clusters": document["clusters"]["count"],
        "greatest_distance": max(max(line) for line in document["distance"]),
        "conditions": summary["conditions"],
    }


@styled
def draw(path: Path, curves: dict[str, list[Curve]], results: dict[str, list[dict[str, Any]]]) -> None:
    """A panel per sweep: the nats of every run, and the budgets as dotted lines."""
    figure = new_figure(PAGE, 2.8)
    axes = grid_of_panels(figure, len(curves), len(curves), "transitions, all tasks together")
    for axis, (name, found) in zip(axes, curves.items(), strict=True):
        budgets = sorted({row["budget_nats"] for row in results[name] if row["budget_nats"] is not None})
        for row, curve in zip(results[name], found, strict=True):
            budget = row["budget_nats"]
            index = row["seed"] if budget is None else budgets.index(budget)
            label = f"seed {row['seed']}" if budget is None else f"budget {budget:g}"
            axis.plot(*zip(*curve, strict=True), label=label, **look(index).line)
        for budget in budgets:
            axis.axhline(budget, color=INK, linewidth=0.8, linestyle=":")
        axis.set(title=name, ylabel="nats per task")
        axis.set_yscale("symlog" if name == "identical" else "log")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        plain_axes(axis, grid="y")
        lines = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axis.legend(list(lines.values()), list(lines))
    write_atomically(path, to_file(figure))


def main() -> None:
    """Collect what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sharing")
    parser.add_argument("identical", type=Path)
    parser.add_argument("conflict", type=Path)
    parser.add_argument("budget", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("experiments/sharing"))
    arguments = parser.parse_args()
    sweeps = {"identical": arguments.identical, "conflict": arguments.conflict, "budget": arguments.budget}
    runs = {name: finished_runs([folder]) for name, folder in sweeps.items()}
    results = {name: [row(run) for run in found] for name, found in runs.items()}
    curves = {name: [nats(run) for run in found] for name, found in runs.items()}
    draw(arguments.folder / "nats.png", curves, results)
    write_json(arguments.folder / "results.json", results)


if __name__ == "__main__":
    main()
