"""The adapters, the ways to take them in, and what is measured after every batch."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from varshare_rl.adapters import Adapter, LowRank
from varshare_rl.transfer.share import BasisMethod, Merge, Share, ShareConfig, SizeConfig, add, consolidate
from varshare_rl.transfer.share.factors import distance, norm

LAYERS = {"layer0": (256, 256), "layer1": (512, 256), "layer2": (256, 512)}  # out, in
RANK = 8
SHARED = 16  # directions that all adapters have in common, on either side
NOISE = 0.07  # norm of each factor's own part, relative to the common part

#: Ways to take in the adapters: options, and when a batch makes the basis decompose again.
POLICIES: dict[str, tuple[ShareConfig, Merge]] = {
    "k = 16, merge always": (ShareConfig(k=SizeConfig(fixed=16)), Merge.always),
    "max_error = 0.15, merge if needed": (ShareConfig(k=SizeConfig(max_error=0.15)), Merge.needed),
    "max_error = 0.15, merge always": (ShareConfig(k=SizeConfig(max_error=0.15)), Merge.always),
    "k = 16, originals kept": (ShareConfig(k=SizeConfig(fixed=16), keep_originals=True), Merge.always),
    "as published, k = 16": (ShareConfig(BasisMethod.paper, SizeConfig(fixed=16)), Merge.always),
}


def common_part(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal ``[out, 16]`` and ``[in, 16]`` of a layer."""
    generator = torch.Generator().manual_seed(1_000_000 + layer)
    out, into = list(LAYERS.values())[layer]
    left, right = (torch.linalg.qr(torch.randn(size, SHARED, generator=generator)).Q for size in (out, into))
    return left, right


COMMON = [common_part(layer) for layer in range(len(LAYERS))]


def adapter(task: int) -> Adapter:
    """One task's adapter, always the same: random in the common directions, plus noise of its own."""
    generator = torch.Generator().manual_seed(task)
    made: Adapter = {}
    for name, sides in zip(LAYERS, COMMON, strict=True):
        b, a = (
            side @ torch.randn(SHARED, RANK, generator=generator)
            + NOISE * (SHARED / len(side)) ** 0.5 * torch.randn(len(side), RANK, generator=generator)
            for side in sides
        )
        made[name] = LowRank(a.t().contiguous(), b, scale=0.5)
    return made


def true_errors(share: Share) -> torch.Tensor:
    """Relative error of every task and layer against its original, ``[tasks, layers]``."""
    rows = []
    for task in share.tasks:
        original, rebuilt = adapter(int(task)), share.rebuild(task)
        row = []
        for name in LAYERS:
            sides = [
                part.double()[None]
                for factors in (original[name].folded(), rebuilt[name])
                for part in (factors.b, factors.a.t())
            ]
            row.append(float(distance(*sides) / norm(*sides[:2])))
        rows.append(row)
    return torch.tensor(rows)


def run(policy: str, tasks: int, batch: int) -> list[dict[str, Any]]:
    """Take in all batches one way; one row per batch."""
    torch.set_num_threads(1)
    options, when = POLICIES[policy]
    consolidate({"warm": adapter(0)}, options)  # the first call of a decomposition loads libraries
    share, rows = None, []
    start_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for first in range(0, tasks, batch):
        new = {str(task): adapter(task) for task in range(first, first + batch)}
        begin = time.process_time()
        share = consolidate(new, options) if share is None else add(share, new, when)
        seconds = time.process_time() - begin
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - start_mb  # before errors are measured
        errors = true_errors(share)
        reported = torch.tensor([layer.errors for layer in share.layers.values()]).t()
        store = share.storage()
        rows.append(
            {
                "policy": policy,
                "tasks": len(share.tasks),
                "k": max(layer.k for layer in share.layers.values()),
                "decompositions": share.merges,
                "mean_error": round(float(errors.mean()), 5),
                "worst_error": round(float(errors.max()), 5),
                "mean_error_of_first_batch": round(float(errors[:batch].mean()), 5),
                "worst_reported_error": round(float(reported.max()), 5),
                "cpu_seconds": round(seconds, 4),
                "peak_mb_above_start": round(peak_mb, 1),
                "stored_bytes": int(store.total_bytes),
                "shared_bytes": store.shared_bytes,
                "task_bytes": round(store.task_bytes, 1),
                "lora_bytes": int(store.lora_bytes),
                "break_even_tasks": store.break_even_tasks,
            }
        )
    return rows
