"""``python -m experiments.lora_choices``: LoRA's settings one at a time, on a small transformer and in runs.

    python -m experiments.lora_choices runs/<sweep> ...

Trains adapters of a small transformer and of a wide network (half a minute on one core) and reads the run folders
inside the given ones, whose rank or ratio of rates differs. Writes ``choices.csv`` and ``choices.png``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from experiments.curves import read_curves
from experiments.lora_choices.regression import fit
from experiments.results import finished_runs, write_csv
from experiments.share_fifty.__main__ import batches
from experiments.share_fifty.rules import Transformer, accuracy, loss_of
from varshare_rl.adapters import apply_lora
from varshare_rl.config import load_config
from varshare_rl.files import write_atomically
from varshare_rl.reporting.figures import grid_of_panels, new_figure, plain_axes, styled, to_file
from varshare_rl.reporting.style import PAGE, look

COLUMNS = ("problem", "choice", "value", "seed", "score", "parameters", "git_commit")
#: The rule that the transformer's base knows, and those that its adapters learn.
BASE, FAMILIES = (1, 3), [(1, 7), (3, 3)]
#: Panels side by side.
ACROSS = 3
#: The setting from which one choice at a time departs.
USUAL: Mapping[str, Any] = {"rank": 8, "alpha": 8, "rate": 5e-3, "ratio": 1, "dropout": 0.0, "layers": "q, v"}
CHOICES: Mapping[str, Sequence[Any]] = {
    "rank": (1, 2, 4, 8, 16, 32),
    "alpha": (2, 8, 32),
    "rate": (1e-3, 5e-3, 2e-2),
    "ratio": (1, 4, 16),
    "dropout": (0.0, 0.1, 0.3),
    "layers": ("q, v", "q, k, v, o", "all linear", "last"),
}
TARGETS: Mapping[str, Any] = {
    "q, v": ["q_proj", "v_proj"],
    "q, k, v, o": None,
    "all linear": "all-linear",
    "last": ["head"],
}


def pretrain(updates: int) -> Transformer:
    """A transformer that knows one rule."""
    model, draw = Transformer(width=64), batches(BASE)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(updates):
        optimizer.zero_grad()
        loss_of(model, *draw()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    print(f"base: {accuracy(model.eval(), BASE):.3f}", flush=True)
    return model


def train(base: Transformer, rule: tuple[int, int], given: Mapping[str, Any], updates: int) -> tuple[float, int]:
    """Accuracy of an adapter on fresh sequences of its rule, mean over the second half of training; its size."""
    torch.manual_seed(10 * rule[0] + rule[1])
    model = copy.deepcopy(base).train()
    lora = apply_lora(model, TARGETS[given["layers"]], dropout=given["dropout"])
    lora.add("task", rank=given["rank"], alpha=given["alpha"])
    lora.activate("task")
    optimizer = torch.optim.Adam(lora.groups("task", given["rate"], given["ratio"]))
    draw, scores = batches(rule), []
    for update in range(1, updates + 1):
        optimizer.zero_grad()
        loss_of(model, *draw()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if update > updates // 2 and update % 10 == 0:
            scores.append(accuracy(model.eval(), rule, count=64))
            model.train()
    return mean(scores), sum(parameter.numel() for parameter in lora.parameters("task"))


def transformer_rows(base_updates: int, updates: int) -> list[dict[str, Any]]:
    """One row for every choice, value and family."""
    base, rows = pretrain(base_updates), []
    trained = cache(lambda rule, given: train(base, rule, dict(given), updates))
    for choice, values in CHOICES.items():
        for value in values:
            for seed, rule in enumerate(FAMILIES):
                score, parameters = trained(rule, tuple({**USUAL, choice: value}.items()))
                rows.append(
                    {
                        "problem": "transformer",
                        "choice": choice,
                        "value": value,
                        "seed": seed,
                        "score": round(score, 4),
                        "parameters": parameters,
                    }
                )
            print(rows[-1], flush=True)
    return rows


def regression_rows() -> list[dict[str, Any]]:
    """LoRA+ on a wide network, by ratio and seed."""
    return [
        {"problem": "regression", "choice": "ratio", "value": ratio, "seed": seed, "score": round(score, 4)}
        for ratio in CHOICES["ratio"]
        for seed in range(3)
        for score in [fit(seed, ratio)]
    ]


def kept_rows(table: Path) -> list[dict[str, Any]]:
    """The rows of an earlier table that no run folders gave."""
    with table.open() as file:
        return [dict(row) for row in csv.DictReader(file) if not row["git_commit"]]


def run_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows from a run folder, the mean of its curve of success: of its rank, or of its ratio of rates, or both."""
    summary, config = json.loads((run_dir / "summary.json").read_text()), load_config(run_dir / "config.yaml")
    ratio = config.optimizer.b_lr_ratio
    curve = read_curves(run_dir, "success")["mean"]
    choices: dict[str, Any] = {"rank": config.network.rank} if ratio == 1 else {}
    if config.network.rank == USUAL["rank"] and config.env.name == "pointmass":
        choices["ratio"] = int(ratio)
    row = {
        "problem": config.env.name,
        "seed": config.seed,
        "score": round(mean(value for _, value in curve), 4),
        "parameters": summary["parameters"]["active_per_task"],
        "git_commit": summary["conditions"]["git_commit"],
    }
    return [{**row, "choice": choice, "value": value} for choice, value in choices.items()]


@styled
def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A panel per problem and choice: points of seeds, a line through their means."""
    panels: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        panels[str(row["problem"]), str(row["choice"])][str(row["value"])].append(float(row["score"]))
    figure = new_figure(PAGE, 1.9 * -(-len(panels) // ACROSS))
    axes = grid_of_panels(figure, len(panels), ACROSS)
    for axis, ((problem, choice), found) in zip(axes, panels.items(), strict=True):
        for place, scores in enumerate(found.values()):
            axis.plot([place] * len(scores), scores, "o", color=look(0).colour, alpha=0.5)
        axis.plot([mean(scores) for scores in found.values()], **look(0).line)
        axis.set_xticks(range(len(found)), list(found))
        axis.set(title=problem, xlabel=choice, ylim=(0, 1.05))
        axis.set_ylabel({"transformer": "accuracy", "regression": "explained"}.get(problem, "success"))
        plain_axes(axis, grid="y")
    write_atomically(path, to_file(figure))


def main() -> None:
    """Read the command line, train, read, write."""
    parser = argparse.ArgumentParser(prog="python -m experiments.lora_choices", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", help="folders that hold run folders")
    parser.add_argument("--keep", action="store_true", help="train nothing: choices.csv has it")
    parser.add_argument("--base-updates", type=int, default=500)
    parser.add_argument("--updates", type=int, default=100, help="of every adapter, of 32 sequences")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the results go")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = given.folder / "choices.csv"
    rows = (
        kept_rows(table)
        if given.keep
        else [*transformer_rows(given.base_updates, given.updates), *regression_rows()]
    )
    found = [row for run in finished_runs(given.runs) for row in run_rows(run)]
    rows += sorted(found, key=lambda row: (row["problem"], row["choice"], row["value"], row["seed"]))
    write_csv(table, COLUMNS, rows)
    draw(given.folder / "choices.png", rows)


if __name__ == "__main__":
    main()
