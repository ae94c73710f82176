"""One VarShare-LoRA layer, forward and backward, against a loop that builds every task's weight."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.bench.contenders import Contender, Round, Setting, measure
from experiments.bench.report import Goal, Ratio, Section
from varshare_rl.nn import VarShareLoRALayer

TASKS, BATCH, SIZE, RANK = 10, 128, 400, 8


def _rounds(forward: Callable[[Tensor], Tensor], layer: nn.Module, setting: Setting) -> Round:
    """Milliseconds per forward and backward pass; the input needs a gradient, as inside a network."""
    x = torch.randn(TASKS, BATCH, SIZE, requires_grad=True)
    target = torch.randn(TASKS, BATCH, SIZE)
    repeats = setting.pick(20, 1)

    def work() -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            layer.zero_grad()
            x.grad = None
            torch.autograd.backward(forward(x), target)
        return (time.perf_counter() - begin) / repeats * 1e3

    return work


def _ours(setting: Setting) -> Round:
    layer = VarShareLoRALayer(SIZE, SIZE, TASKS, RANK)
    ids = torch.arange(TASKS)
    return _rounds(lambda x: layer(x, ids), layer, setting)


def _naive(setting: Setting) -> Round:
    layer = VarShareLoRALayer(SIZE, SIZE, TASKS, RANK)

    def forward(x: Tensor) -> Tensor:
        outputs = []
        for task in range(TASKS):
            sigma_a, sigma_b = F.softplus(layer.rhos_A[task]), F.softplus(layer.rhos_B[task])
            a = layer.mus_A[task] + sigma_a * torch.randn_like(sigma_a)
            b = layer.mus_B[task] + sigma_b * torch.randn_like(sigma_b)
            outputs.append(F.linear(x[task], layer.theta + layer.scale * (b @ a), layer.bias))
        return torch.stack(outputs)

    return _rounds(forward, layer, setting)


def _plain(setting: Setting) -> Round:
    layer = nn.Linear(SIZE, SIZE)
    return _rounds(layer, layer, setting)


CONTENDERS: dict[str, Contender] = {
    "VarShareLoRALayer": _ours,
    "loop over tasks": _naive,
    "nn.Linear": _plain,
}


def run(rounds: int, setting: Setting) -> list[Section]:
    """The layer of the published size."""
    values = measure(__name__, list(CONTENDERS), rounds, setting)
    ratios = [
        Ratio("VarShareLoRALayer", "loop over tasks", Goal(0.5)),
        Ratio("VarShareLoRALayer", "nn.Linear"),
        Ratio("loop over tasks", "nn.Linear"),
    ]
    title = f"Layer, forward + backward: {TASKS} tasks x {BATCH} rows, {SIZE} x {SIZE}, rank {RANK}"
    return [Section(title, "ms", values, ratios)]
