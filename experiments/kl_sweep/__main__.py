"""Read the runs of sweeps over ``elbo.kl_weight`` and write ``sweep.csv``, ``sweep.png`` and ``posteriors.png``."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import matplotlib
import torch
from torch import Tensor

from experiments.results import finished_runs, write_csv
from varshare_rl.assemble import load_agent
from varshare_rl.config import Device, TrainConfig
from varshare_rl.nn.parameters import total_kl
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.ops.gaussian import softplus_sigma
from varshare_rl.run.sharing import sharing_document

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SPREADS = tuple(f"sigma_{round(100 * quantile)}" for quantile in QUANTILES)
COLUMNS = (
    "suite", "network", "kl_weight", "seed", "success", "return", "nats", "least_nats", "most_nats", "critic_nats",
    "sharing", *SPREADS, "mu_step", "rho_step", "transitions", "seconds", "git_commit",
)  # fmt: skip
SUITES = ("pointmass", "cartpole identical", "cartpole variants", "metaworld")
#: Networks whose penalty has the weight; those of the others are lines.
DIALLED = {"varshare_lora": "C0", "l2_soft": "C1"}
LEVEL = {"lora": ("C2", "--"), "shared": ("C3", "-."), "independent": ("C4", ":")}
MEASURES = {"success": "success", "nats": "policy, nats", "critic_nats": "critic, nats", "sharing": "sharing"}

Row = dict[str, object]


def suite_name(config: TrainConfig) -> str:
    """Name of the suite of a run, with the set of cartpole's tasks."""
    name: str = config.env.name
    return f"{name} {config.env.variant_set}" if name == "cartpole" else name


def relative_sigmas(modules: Mapping[str, torch.nn.Module]) -> Tensor:
    """Return the posteriors' standard deviations over those of their priors, ``[N]``; empty without posteriors."""
    ratios = [torch.empty(0)]
    for module in modules.values():
        for _, layer in stochastic_layers(module):
            prior = layer.prior_scale.view(-1, 1, 1)
            ratios += [(softplus_sigma(rho) / prior).detach().flatten() for _, rho in layer.posteriors()]
    return torch.cat(ratios)


def read(run_dir: Path) -> Row:
    """One row of the CSV from a run folder."""
    summary = json.loads((run_dir / "summary.json").read_text())
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    agent = load_agent(run_dir, "last", Device.cpu)
    modules = agent.algorithm.trained_modules()
    by_network = {name: total_kl(part, len(agent.suite.task_names)).detach() for name, part in modules.items()}
    nats = by_network["actor"]
    sigmas = relative_sigmas({"actor": modules["actor"]})
    row: Row = {
        "suite": suite_name(agent.config),
        "network": agent.config.network.name,
        "kl_weight": agent.config.elbo.kl_weight,
        "seed": agent.config.seed,
        # cartpole has no goal: the share of the 500 steps that the pole was up
        "success": round(
            summary["mean_return"] / 500 if agent.config.env.name == "cartpole" else summary["mean_success"], 4
        ),
        "return": round(summary["mean_return"], 3),
        "nats": round(float(nats.mean()), 3),
        "least_nats": round(float(nats.min()), 3),
        "most_nats": round(float(nats.max()), 3),
        "critic_nats": round(float(by_network["critic"].mean()), 3),
        "sharing": round(sharing_document(modules, agent.suite.task_names, 0)["sharing"], 6),
        "transitions": summary["transitions"],
        "seconds": round(summary["seconds"]),
        "git_commit": summary["conditions"]["git_commit"],
    }
    for name in ("mu", "rho"):
        steps = [line[key] for line in logged if (key := f"optimizer/actor_{name}_step") in line]
        row[f"{name}_step"] = round(mean(steps), 4) if steps else ""
    for name, quantile in zip(SPREADS, QUANTILES, strict=True):
        row[name] = round(float(torch.quantile(sigmas, quantile)), 4) if len(sigmas) else ""
    return row


def number(row: Row, name: str) -> float:
    """A column as a number."""
    return float(str(row[name]))


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str], dict[float, list[Row]]]:
    """Rows by suite and network, then by weight in order."""
    groups: dict[tuple[str, str], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: number(row, "kl_weight")):
        groups[str(row["suite"]), str(row["network"])][number(row, "kl_weight")].append(row)
    return groups


def draw(path: Path, rows: Sequence[Row]) -> None:
    """One column of panels per suite, one row per measure; lines are means over seeds, dots are runs."""
    groups = grouped(rows)
    suites = [suite for suite in SUITES if any(key[0] == suite for key in groups)]
    figure, axes = plt.subplots(len(MEASURES), len(suites), figsize=(3.6 * len(suites), 9.6), squeeze=False)
    for column, suite in enumerate(suites):
        for line, (measure, label) in enumerate(MEASURES.items()):
            axis = axes[line][column]
            for network, color in DIALLED.items():
                _dial(axis, groups.get((suite, network), {}), measure, network, color)
            for network, (color, style) in LEVEL.items():
                runs = [row for found in groups.get((suite, network), {}).values() for row in found]
                if runs and "nats" not in measure:
                    level = mean(number(row, measure) for row in runs)
                    axis.axhline(level, color=color, linestyle=style, label=network)
            axis.set_xscale("log")
            if "nats" in measure:
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
            if line == 0:
                axis.set_title(suite)
        axes[-1][column].set_xlabel("kl_weight")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _dial(axis: Axes, by_weight: Mapping[float, Sequence[Row]], measure: str, label: str, color: str) -> None:
    points = {weight: [number(row, measure) for row in found] for weight, found in by_weight.items()}
    axis.plot([*points], [mean(values) for values in points.values()], color=color, label=label)
    for weight, values in points.items():
        axis.scatter([weight] * len(values), values, s=9, alpha=0.5, color=color)


def draw_posteriors(path: Path, rows: Sequence[Row]) -> None:
    """Quantiles of the posteriors' standard deviations over their priors', and the nats of the tasks."""
    groups = {suite: found for (suite, network), found in grouped(rows).items() if network == "varshare_lora"}
    suites = [suite for suite in SUITES if suite in groups]
    figure, axes = plt.subplots(2, len(suites), figsize=(3.6 * len(suites), 5.4), squeeze=False, sharex="col")
    for column, suite in enumerate(suites):
        weights, upper, lower = [*groups[suite]], axes[0][column], axes[1][column]
        sigma = {
            name: [mean(number(row, name) for row in found) for found in groups[suite].values()] for name in SPREADS
        }
        for inside, alpha, label in ((0, 0.2, "5 to 95 %"), (1, 0.4, "25 to 75 %")):
            low, high = sigma[SPREADS[inside]], sigma[SPREADS[-1 - inside]]
            upper.fill_between(weights, low, high, alpha=alpha, color="C0", label=label)
        upper.plot(weights, sigma[SPREADS[2]], color="C0", label="median")
        upper.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label="start")
        for name, style in (("most_nats", "--"), ("nats", "-"), ("least_nats", "-.")):
            values = [mean(number(row, name) for row in found) for found in groups[suite].values()]
            label = {"most_nats": "dearest task", "nats": "mean", "least_nats": "cheapest task"}[name]
            lower.plot(weights, values, color="C0", linestyle=style, label=label)
        upper.set_title(suite)
        upper.set_xscale("log")
        lower.set_yscale("log")
        lower.set_xlabel("kl_weight")
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("sigma over the prior's")
    axes[1][0].set_ylabel("policy, nats")
    axes[0][0].legend(fontsize=7)
    axes[1][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def print_table(rows: Sequence[Row]) -> None:
    """Means over seeds as a Markdown table on the screen."""
    columns = (
        "suite", "network", "kl_weight", "seeds", "success (of seeds)", "policy, nats (by task)", "critic, nats",
        "sharing",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for (suite, network), by_weight in sorted(grouped(rows).items()):
        for weight, found in by_weight.items():
            success = [number(row, "success") for row in found]
            nats, least, most, critic, sharing = (
                mean(number(row, name) for row in found)
                for name in ("nats", "least_nats", "most_nats", "critic_nats", "sharing")
            )
            spread = f"{mean(success):.3f} ({min(success):.2f} to {max(success):.2f})"
            priced = f"{nats:,.0f} ({least:,.0f} to {most:,.0f}) | {critic:,.0f}" if nats else "none | none"
            dial = f"{weight:g}" if network in DIALLED else ""
            print(f"| {suite} | `{network}` | {dial} | {len(found)} | {spread} | {priced} | {sharing:.4f} |")


def main() -> None:
    """Collect what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m experiments.kl_sweep")
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--folder", type=Path, default=Path("experiments/kl_sweep"))
    arguments = parser.parse_args()
    runs = finished_runs(arguments.sweeps)
    if not runs:
        raise SystemExit("error: no finished run in these folders; give folders of sweeps")
    rows = [read(run) for run in runs]
    names = ("suite", "network")
    rows.sort(key=lambda row: (*(str(row[name]) for name in names), number(row, "kl_weight"), number(row, "seed")))
    write_csv(arguments.folder / "sweep.csv", COLUMNS, rows)
    draw(arguments.folder / "sweep.png", rows)
    draw_posteriors(arguments.folder / "posteriors.png", rows)
    print_table(rows)


if __name__ == "__main__":
    main()
