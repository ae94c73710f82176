"""Read the runs of sweeps over ``elbo.kl_weight`` and write ``sweep.csv``, ``sweep.png`` and ``posteriors.png``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from experiments.results import Row, average, finished_runs, grouped, logged, markdown, number, write_csv
from varshare_rl.assemble import load_agent
from varshare_rl.config import Device, TrainConfig
from varshare_rl.files import write_atomically
from varshare_rl.nn.parameters import total_kl
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.ops.gaussian import softplus_sigma
from varshare_rl.reporting.figures import legend_below, new_figure, plain_axes, styled, to_file
from varshare_rl.reporting.style import INK, PAGE, QUALITATIVE, Look, look
from varshare_rl.run.sharing import sharing_document

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SPREADS = tuple(f"sigma_{round(100 * quantile)}" for quantile in QUANTILES)
COLUMNS = (
    "suite", "network", "kl_weight", "seed", "success", "return", "nats", "least_nats", "most_nats", "critic_nats",
    "sharing", *SPREADS, "mu_step", "rho_step", "transitions", "seconds", "git_commit",
)  # fmt: skip
SUITES = ("pointmass", "cartpole identical", "cartpole variants", "metaworld")
#: Networks whose penalty has the weight; those of the others are lines.
DIALLED = {"varshare_lora": look(0), "l2_soft": look(1)}
LEVEL = {"lora": look(2), "shared": look(3), "independent": look(4)}
MEASURES = {"success": "success", "nats": "policy, nats", "critic_nats": "critic, nats", "sharing": "sharing"}


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
    lines = logged(run_dir)
    agent = load_agent(run_dir, "last", Device.cpu)
    modules = agent.algorithm.trained_modules()
    by_network = {name: total_kl(part, len(agent.suite.task_names)).detach() for name, part in modules.items()}
    nats = by_network["actor"]
    sigmas = relative_sigmas({"actor": modules["actor"]})
    sharing = sharing_document(modules, agent.suite.task_names, 0)["sharing"]  # None: no layer has weights per task
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
        "sharing": 1.0 if sharing is None else round(sharing, 6),
        "transitions": summary["transitions"],
        "seconds": round(summary["seconds"]),
        "git_commit": summary["conditions"]["git_commit"],
    }
    for name in ("mu", "rho"):
        steps = [line[key] for line in lines if (key := f"optimizer/actor_{name}_step") in line]
        row[f"{name}_step"] = round(mean(steps), 4) if steps else ""
    for name, quantile in zip(SPREADS, QUANTILES, strict=True):
        row[name] = round(float(torch.quantile(sigmas, quantile)), 4) if len(sigmas) else ""
    return row


def by_weight(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[float, list[Row]]]:
    """Rows by suite and network, then by weight in order."""
    ordered = sorted(rows, key=lambda row: number(row, "kl_weight"))
    return {
        key: {float(weight): runs for (weight,), runs in grouped(members, "kl_weight").items()}
        for key, members in grouped(ordered, "suite", "network").items()
    }


@styled
def draw(path: Path, rows: Sequence[Row]) -> None:
    """One column of panels per suite, one row per measure; lines are means over seeds, dots are runs."""
    groups = by_weight(rows)
    suites = [suite for suite in SUITES if any(key[0] == suite for key in groups)]
    figure = new_figure(PAGE, 7.6)
    axes = figure.subplots(len(MEASURES), len(suites), squeeze=False)
    for column, suite in enumerate(suites):
        for line, (measure, label) in enumerate(MEASURES.items()):
            axis = axes[line][column]
            for network, seen in DIALLED.items():
                _dial(axis, groups.get((suite, network), {}), measure, seen)
            for network, seen in LEVEL.items():
                runs = [row for found in groups.get((suite, network), {}).values() for row in found]
                if runs and "nats" not in measure:
                    axis.axhline(average(runs, measure), **seen.line)
            axis.set_xscale("log")
            if "nats" in measure:
                axis.set_yscale("log")
            plain_axes(axis, grid="both")
            if column == 0:
                axis.set_ylabel(label)
            if line == 0:
                axis.set_title(suite)
        axes[-1][column].set_xlabel("kl_weight")
    present = {network for _, network in groups}
    looks = {name: seen for name, seen in (DIALLED | LEVEL).items() if name in present}
    legend_below(figure, [Line2D([], [], **seen.line) for seen in looks.values()], list(looks))
    write_atomically(path, to_file(figure))


def _dial(axis: Axes, runs: Mapping[float, Sequence[Row]], measure: str, seen: Look) -> None:
    points = {weight: [number(row, measure) for row in found] for weight, found in runs.items()}
    axis.plot([*points], [mean(values) for values in points.values()], **seen.line)
    for weight, values in points.items():
        axis.scatter([weight] * len(values), values, s=9, alpha=0.5, color=seen.colour)


@styled
def draw_posteriors(path: Path, rows: Sequence[Row]) -> None:
    """Quantiles of the posteriors' standard deviations over their priors', and the nats of the tasks."""
    groups = {suite: found for (suite, network), found in by_weight(rows).items() if network == "varshare_lora"}
    suites = [suite for suite in SUITES if suite in groups]
    figure = new_figure(PAGE, 4.4)
    axes = figure.subplots(2, len(suites), squeeze=False, sharex="col")
    for column, suite in enumerate(suites):
        weights, upper, lower = [*groups[suite]], axes[0][column], axes[1][column]
        sigma = {name: [average(found, name) for found in groups[suite].values()] for name in SPREADS}
        for inside, alpha, label in ((0, 0.2, "5 to 95 %"), (1, 0.4, "25 to 75 %")):
            low, high = sigma[SPREADS[inside]], sigma[SPREADS[-1 - inside]]
            upper.fill_between(weights, low, high, alpha=alpha, color=QUALITATIVE[0], label=label)
        upper.plot(weights, sigma[SPREADS[2]], color=QUALITATIVE[0], label="median")
        upper.axhline(1.0, color=INK, linewidth=0.8, linestyle=":", label="start")
        for name, style in (("most_nats", "--"), ("nats", "-"), ("least_nats", "-.")):
            values = [average(found, name) for found in groups[suite].values()]
            label = {"most_nats": "dearest task", "nats": "mean", "least_nats": "cheapest task"}[name]
            lower.plot(weights, values, color=QUALITATIVE[0], linestyle=style, label=label)
        upper.set_title(suite)
        upper.set_xscale("log")
        lower.set_yscale("log")
        lower.set_xlabel("kl_weight")
        for axis in (upper, lower):
            plain_axes(axis, grid="both")
    axes[0][0].set_ylabel("sigma over the prior's")
    axes[1][0].set_ylabel("policy, nats")
    axes[0][0].legend()
    axes[1][0].legend()
    write_atomically(path, to_file(figure))


def print_table(rows: Sequence[Row]) -> None:
    """Means over seeds as a Markdown table on the screen."""
    columns = (
        "suite", "network", "kl_weight", "seeds", "success (of seeds)", "policy, nats (by task)", "critic, nats",
        "sharing",
    )  # fmt: skip
    lines = []
    for (suite, network), runs in sorted(by_weight(rows).items()):
        for weight, found in runs.items():
            success = [number(row, "success") for row in found]
            nats, least, most, critic, sharing = (
                average(found, name) for name in ("nats", "least_nats", "most_nats", "critic_nats", "sharing")
            )
            lines.append(
                (
                    suite,
                    f"`{network}`",
                    f"{weight:g}" if network in DIALLED else "",
                    f"{len(found)}",
                    f"{mean(success):.3f} ({min(success):.2f} to {max(success):.2f})",
                    f"{nats:,.0f} ({least:,.0f} to {most:,.0f})" if nats else "none",
                    f"{critic:,.0f}" if nats else "none",
                    f"{sharing:.4f}",
                )
            )
    print(markdown(columns, lines))


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
