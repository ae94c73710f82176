"""Measure, and write ``variance.csv``, ``cost.csv`` and ``estimators.png``."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from experiments.results import write_csv
from varshare_rl.files import write_atomically
from varshare_rl.nn import Posterior, VarShareConfig, VarShareLoRAConfig
from varshare_rl.nn.config import NetworkConfig
from varshare_rl.reporting.figures import legend_below, new_figure, plain_axes, styled, to_file
from varshare_rl.reporting.style import INK, PAGE, look

TASKS, BATCH, IN, HIDDEN, OUT, RANK = 10, 128, 39, 128, 8, 8
SIGMAS = (0.0067, 0.02, 0.05, 0.1, 0.2)
CONTENDERS = {
    "weight": ("weight", 1),
    "weight, 4 samples": ("weight", 4),
    "flipout": ("flipout", 1),
    "local": ("local", 1),
}
NETWORKS: dict[str, Callable[[], NetworkConfig]] = {
    "varshare_lora": lambda: VarShareLoRAConfig(hidden=[HIDDEN, HIDDEN], rank=RANK),
    "varshare": lambda: VarShareConfig(hidden=[HIDDEN, HIDDEN]),
}


def build(network: str, estimator: str, weight_samples: int, sigma: float) -> nn.Module:
    """A network whose factors have means of trained size and one sigma; the same for every estimator."""
    torch.manual_seed(0)
    made = NETWORKS[network]().build(IN, OUT, TASKS, Posterior(estimator=estimator, weight_samples=weight_samples))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "rhos" in name:
                parameter.fill_(math.log(math.expm1(sigma)))
            elif "mus" in name:
                parameter.normal_(0.0, 0.1 if network == "varshare_lora" else 0.03)
    return made


def gradients(made: nn.Module, x: Tensor, target: Tensor, draws: int) -> Iterator[dict[str, Tensor]]:
    """Gradients of half the mean squared error, for ``theta`` with biases, ``mu`` and ``rho``."""
    ids = torch.arange(TASKS)
    for _ in range(draws):
        made.zero_grad()
        torch.autograd.backward(0.5 * (made(x, ids) - target).square().mean())
        kinds: dict[str, list[Tensor]] = {"theta": [], "mu": [], "rho": []}
        for name, parameter in made.named_parameters():
            kind = "rho" if "rhos" in name else "mu" if "mus" in name else "theta"
            if parameter.grad is not None:  # rho has none under the mean
                kinds[kind].append(parameter.grad.flatten())
        yield {kind: torch.cat(parts) for kind, parts in kinds.items() if parts}


def variances(made: nn.Module, x: Tensor, target: Tensor, draws: int) -> dict[str, float]:
    """Trace of the covariance of the gradient, by kind of parameter (Welford's recurrence)."""
    means: dict[str, Tensor] = {}
    squares: dict[str, float] = {}
    for count, sample in enumerate(gradients(made, x, target, draws), start=1):
        for kind, value in sample.items():
            old = means.get(kind, torch.zeros_like(value))
            new = old + (value - old) / count
            squares[kind] = squares.get(kind, 0.0) + float(((value - old) * (value - new)).sum())
            means[kind] = new
    return {kind: value / (draws - 1) for kind, value in squares.items()}


def measure_variances(draws: int) -> list[dict[str, object]]:
    """One row per network, sigma and estimator."""
    torch.manual_seed(1)
    x, target = torch.randn(TASKS, BATCH, IN), torch.randn(TASKS, BATCH, OUT)
    rows: list[dict[str, object]] = []
    for network in NETWORKS:
        for sigma in SIGMAS:
            base: dict[str, float] = {}
            for name, (estimator, weight_samples) in CONTENDERS.items():
                found = variances(build(network, estimator, weight_samples, sigma), x, target, draws)
                base = base or found
                row: dict[str, object] = {"network": network, "sigma": sigma, "estimator": name}
                for kind, value in found.items():
                    row[kind] = f"{value:.4g}"
                    row[f"{kind}_to_weight"] = f"{value / base[kind]:.4g}"
                rows.append(row)
                print(row, flush=True)
    return rows


def measure_costs(rounds: int) -> list[dict[str, object]]:
    """Milliseconds of a forward and backward pass, in interleaved rounds; the ratio is to ``mean``."""
    x, target = torch.randn(TASKS, BATCH, IN), torch.randn(TASKS, BATCH, OUT)
    rows: list[dict[str, object]] = []
    for network in NETWORKS:
        names = {"mean": ("mean", 1), **CONTENDERS}
        made = {name: build(network, *chosen, 0.05) for name, chosen in names.items()}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds + 1):
            for name, module in made.items():
                begin = time.perf_counter()
                for _ in gradients(module, x, target, 20):
                    pass
                seconds[name].append((time.perf_counter() - begin) / 20)
        for name, values in seconds.items():
            ratios = [value / base for value, base in zip(values[1:], seconds["mean"][1:], strict=True)]
            row = {"network": network, "estimator": name, "ms": f"{1e3 * median(values[1:]):.3g}"}
            rows.append({**row, "to_mean": f"{median(ratios):.3g}", "rounds": rounds})
            print(rows[-1], flush=True)
    return rows


@styled
def draw(path: Path, rows: list[dict[str, object]]) -> None:
    """Variance of the gradient relative to ``weight`` against sigma, for each network and kind of parameter."""
    kinds = ("theta", "mu", "rho")
    figure = new_figure(PAGE, 4.4)
    axes = figure.subplots(len(NETWORKS), len(kinds), sharex=True, sharey=True)
    for line, network in zip(axes, NETWORKS, strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            for index, name in enumerate(CONTENDERS):
                chosen = [row for row in rows if row["network"] == network and row["estimator"] == name]
                values = [float(str(row[f"{kind}_to_weight"])) for row in chosen]
                axis.loglog([float(str(row["sigma"])) for row in chosen], values, label=name, **look(index).line)
            axis.axhline(0.2, color=INK, linewidth=0.8, linestyle=":")
            axis.set_title(f"{network}: gradient of {kind}")
            plain_axes(axis, grid="y")
    for axis in axes[-1]:
        axis.set_xlabel("sigma of the factors")
    for axis in axes[:, 0]:
        axis.set_ylabel("variance relative to weight")
    legend_below(figure, *axes[0, 0].get_legend_handles_labels())
    write_atomically(path, to_file(figure))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.estimators")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("experiments/estimators"))
    arguments = parser.parse_args()
    costs = measure_costs(arguments.rounds)
    rows = measure_variances(arguments.draws)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.folder / "cost.csv", list(costs[0]), costs)
    write_csv(arguments.folder / "variance.csv", list(rows[0]), rows)
    draw(arguments.folder / "estimators.png", rows)


if __name__ == "__main__":
    main()
