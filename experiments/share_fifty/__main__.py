"""``python -m experiments.share_fifty``: fifty LoRA adapters, one Share model, ten families that it has not seen.

Writes ``results.json`` and ``results.md`` into this folder; some ten minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.share_fifty.rules import FAMILIES, Transformer, accuracy, loss_of, sequences
from varshare_rl.adapters import Adapter, apply_lora
from varshare_rl.files import write_atomically, write_json
from varshare_rl.run.results import provenance
from varshare_rl.transfer.share import (
    LearnConfig,
    Share,
    ShareConfig,
    SizeConfig,
    attach,
    average,
    consolidate,
    fine_tune,
    trained_parameters,
    using_tasks,
)

Rule = tuple[int, int]
TARGETS = ["q_proj", "v_proj"]
HELD_OUT = 10
BATCH = 64


def pretrain(updates: int, told_share: float = 0.8) -> Transformer:
    """A base that knows all rules when it is told which, and was told in most of its sequences."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, updates)
    families = torch.tensor(FAMILIES)
    for _ in range(updates):
        rules = families[torch.randint(len(families), (BATCH,), generator=generator)]
        told = max(1, int(told_share * BATCH))
        parts = sequences(rules[:told], True, generator), sequences(rules[told:], False, generator)
        tokens, answers = (torch.cat(part) for part in zip(*parts, strict=True))
        optimizer.zero_grad()
        loss_of(model, tokens, answers).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def batches(rule: Rule) -> Callable[[], tuple[Tensor, Tensor]]:
    """Fresh sequences of one rule that do not say which it is."""
    generator = torch.Generator().manual_seed(100 * rule[0] + rule[1])
    rules = torch.tensor([rule]).expand(BATCH // 2, 2)
    return lambda: sequences(rules, False, generator)


def train_lora(base: Transformer, rule: Rule, updates: int, rank: int) -> tuple[Adapter, float]:
    """An adapter for one family, and its accuracy."""
    torch.manual_seed(100 * rule[0] + rule[1])
    model = copy.deepcopy(base)
    lora = apply_lora(model, TARGETS, rank=rank)
    lora.add("task")
    lora.activate("task")
    optimizer = torch.optim.Adam(lora.parameters("task"), lr=5e-3)
    draw = batches(rule)
    for _ in range(updates):
        optimizer.zero_grad()
        loss_of(model, *draw()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return lora.adapter("task"), accuracy(model, rule)


def with_adapter(base: Transformer, adapter: Adapter) -> Transformer:
    """The base with an adapter added to its weights."""
    model = copy.deepcopy(base)
    for name, factors in adapter.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.add_(factors.delta())
    return model


def learn_coefficients(base: Transformer, share: Share, rule: Rule, updates: int, p: int) -> tuple[int, float]:
    """Trained parameters and accuracy of a new family that gets coefficients alone."""
    torch.manual_seed(100 * rule[0] + rule[1])
    model = copy.deepcopy(base)
    attach(model, share, LearnConfig(p=p), fresh=1)
    draw = batches(rule)
    with using_tasks(model, 0):
        fine_tune(model, lambda: loss_of(model, *draw()), updates, learning_rate=2e-2)
        return sum(parameter.numel() for parameter in trained_parameters(model)), accuracy(model, rule)


def measure(given: argparse.Namespace, log: Callable[[str], None]) -> dict[str, Any]:
    """The whole experiment; every accuracy is a mean over families."""
    families = FAMILIES.copy()
    random.Random(0).shuffle(families)
    held_out, seen = families[:HELD_OUT], families[HELD_OUT:][: given.families]
    base = pretrain(given.base_updates)
    result: dict[str, Any] = {"families": len(seen), "held_out_families": len(held_out)}
    told = [accuracy(base, rule, told=True) for rule in seen + held_out]
    result["base, told the rule"] = {"all": statistics.mean(told)}
    result["base"] = rows(seen, held_out, lambda rule: accuracy(base, rule))
    log(f"base: {result['base']}, told the rule: {result['base, told the rule']}")

    trained = {str(rule): train_lora(base, rule, given.updates, given.rank) for rule in seen}
    unseen = {str(rule): train_lora(base, rule, given.updates, given.rank)[1] for rule in held_out}
    result["LoRA per task"] = rows(
        seen, held_out, lambda rule: {**{t: v[1] for t, v in trained.items()}, **unseen}[str(rule)]
    )
    log(f"LoRA per task: {result['LoRA per task']}")
    adapters = {task: adapter for task, (adapter, _) in trained.items()}
    numbers = sum(factors.a.numel() + factors.b.numel() for factors in adapters[str(seen[0])].values())

    for k in given.k:
        share = consolidate(adapters, ShareConfig(k=SizeConfig(fixed=k)))
        name = f"Share, k = {k}"
        result[name] = {
            "seen": statistics.mean(accuracy(with_adapter(base, share.rebuild(str(rule))), rule) for rule in seen)
        }
        errors = [error for layer in share.layers.values() for error in layer.errors]
        learnt = [learn_coefficients(base, share, rule, given.updates, p=1) for rule in held_out]
        mean = with_adapter(base, average(share))
        result[name] |= {
            "held out, coefficients only (p = 1)": statistics.mean(score for _, score in learnt),
            "held out, averaged coefficients": statistics.mean(accuracy(mean, rule) for rule in held_out),
            "trained parameters of a new task": learnt[0][0],
            "LoRA's trained parameters": numbers,
            "times fewer": numbers / learnt[0][0],
            "mean error": statistics.mean(errors),
            "worst error": max(errors),
            "storage": share.storage().as_dict(),
        }
        log(f"{name}: { {key: value for key, value in result[name].items() if key != 'storage'} }")
    return result


def rows(seen: Sequence[Rule], held_out: Sequence[Rule], score: Callable[[Rule], float]) -> dict[str, float]:
    """Mean scores of the families that make the basis and of those that do not."""
    return {
        "seen": statistics.mean(score(rule) for rule in seen),
        "held out": statistics.mean(score(rule) for rule in held_out),
    }


#: Accuracy below that of an adapter per task which still counts as parity.
PARITY = 0.01


def criteria(result: dict[str, Any]) -> list[str]:
    """A table of the three things that Share is to show, and whether each model does."""
    lora = result["LoRA per task"]
    lines = [
        "| criterion | " + " | ".join(key for key in result if key.startswith("Share")) + " |",
        "|---|" + "---|" * sum(key.startswith("Share") for key in result),
    ]
    rows: dict[str, list[str]] = {
        f"parity without replay: seen families within {PARITY} of an adapter each, nothing trained again": [],
        f"one model for {result['families']} adapters: fewer bytes than they take": [],
        f"coefficients only: held-out families within {PARITY} of an adapter each": [],
    }
    for own in (own for key, own in result.items() if key.startswith("Share")):
        bytes_share, bytes_lora = own["storage"]["total_bytes"], own["storage"]["lora_bytes"]
        fresh = own["held out, coefficients only (p = 1)"]
        verdicts = (
            (own["seen"] >= lora["seen"] - PARITY, f"{own['seen']:.3f} of {lora['seen']:.3f}"),
            (bytes_share < bytes_lora, f"{bytes_share / bytes_lora:.2f} of the bytes"),
            (
                fresh >= lora["held out"] - PARITY,
                f"{fresh:.3f} of {lora['held out']:.3f}, {own['times fewer']:.0f} times fewer trained",
            ),
        )
        for cells, (met, figures) in zip(rows.values(), verdicts, strict=True):
            cells.append(f"{'met' if met else 'not met'}: {figures}")
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())]


def page(result: dict[str, Any], given: argparse.Namespace) -> str:
    """The results as a table."""
    lines = [
        "| model | seen families | held-out families | trained per new task | stored bytes |",
        "|---|---|---|---|---|",
    ]
    numbers = next(value for key, value in result.items() if key.startswith("Share"))["LoRA's trained parameters"]
    base, lora = result["base"], result["LoRA per task"]
    lines.append(f"| base | {base['seen']:.3f} | {base['held out']:.3f} | 0 | 0 |")
    lora_bytes = 4 * numbers * given.families
    lines.append(f"| LoRA per task | {lora['seen']:.3f} | {lora['held out']:.3f} | {numbers} | {lora_bytes} |")
    for key, own in result.items():
        if key.startswith("Share"):
            fresh, mean = own["held out, coefficients only (p = 1)"], own["held out, averaged coefficients"]
            total = int(own["storage"]["total_bytes"])
            trained = own["trained parameters of a new task"]
            lines.append(
                f"| {key} | {own['seen']:.3f} | {fresh:.3f} (averaged: {mean:.3f}) | {trained} | {total} |"
            )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m experiments.share_fifty", description=__doc__)
    parser.add_argument("--families", type=int, default=len(FAMILIES) - HELD_OUT, help="that make the basis")
    parser.add_argument("--base-updates", type=int, default=3000)
    parser.add_argument("--updates", type=int, default=300, help="of every adapter and of new coefficients")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the results go")
    given = parser.parse_args(arguments)
    if not 2 <= given.families <= len(FAMILIES) - HELD_OUT:
        parser.error(f"--families {given.families} must be between 2 and {len(FAMILIES) - HELD_OUT}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    begin = time.perf_counter()
    result = measure(given, lambda line: print(f"{time.perf_counter() - begin:6.0f} s  {line}", flush=True))
    settings = {key: value for key, value in vars(given).items() if key != "folder"}
    about = provenance({**settings, "seconds": round(time.perf_counter() - begin, 1)}, seed=0)
    write_json(given.folder / "results.json", {"results": result, "conditions": about})
    written = "\n".join([page(result, given), *criteria(result), ""])
    write_atomically(given.folder / "results.md", written)
    print(written)


if __name__ == "__main__":
    main()
