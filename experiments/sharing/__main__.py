"""Tables and curves from the three sweeps that README.md names: ``results.json`` and ``nats.png``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

from experiments.results import finished_runs
from varshare_rl.assemble import load_agent
from varshare_rl.config import Device
from varshare_rl.files import write_json
from varshare_rl.run.sharing import sharing_document

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Curve = list[tuple[int, float]]
#: The budget of a run counts as held from this share of its transitions on.
SETTLED = 0.8


def nats(run: Path) -> Curve:
    """Mean nats per task against transitions, as the run logged them."""
    curve = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
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
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for axis, (name, found) in zip(axes, runs.items(), strict=True):
        for run, result in zip(found, results[name], strict=True):
            budget = result["budget_nats"]
            label = f"seed {result['seed']}" if budget is None else f"budget {budget:g}, seed {result['seed']}"
            color = (
                None
                if budget is None
                else f"C{sorted({other['budget_nats'] for other in results[name]}).index(budget)}"
            )
            axis.plot(*zip(*nats(run), strict=True), label=label, linewidth=1, color=color)
            if budget is not None:
                axis.axhline(budget, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=name, xlabel="transitions", ylabel="nats per task")
        axis.set_yscale("symlog" if name == "identical" else "log")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(arguments.folder / "nats.png", dpi=110)
    write_json(arguments.folder / "results.json", results)


if __name__ == "__main__":
    main()
