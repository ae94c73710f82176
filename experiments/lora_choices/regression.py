"""A wide network that differs from its target by a low-rank correction of every layer."""

from __future__ import annotations

import copy

import torch
from torch import nn

from varshare_rl.adapters import apply_lora

WIDTH, RANK, ROWS = 256, 8, 128


def fit(seed: int, ratio: float, updates: int = 60, rate: float = 1e-3) -> float:
    """Explained share of the target's distance from the base, mean over the second half of training.

    An adapter of the right rank learns with ``ratio`` times the rate for ``B`` (LoRA+).
    """
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8))
    target = copy.deepcopy(base)
    with torch.no_grad():
        for layer in target:
            if isinstance(layer, nn.Linear):
                rows, columns = layer.weight.shape
                layer.weight.add_(torch.randn(rows, RANK) @ torch.randn(RANK, columns) / (RANK * columns) ** 0.5)
    lora = apply_lora(base, ["0", "2", "4"], rank=RANK)
    lora.add("task")
    optimizer = torch.optim.Adam(lora.groups("task", rate, ratio))
    explained = []
    for update in range(updates):
        x = torch.randn(ROWS, 32)
        with torch.no_grad():
            wanted = target(x)
            lora.activate(None)
            apart = (base(x) - wanted).square().mean()
        lora.activate("task")
        loss = (base(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update >= updates // 2:
            explained.append(1.0 - float(loss.detach() / apart))
    return sum(explained) / len(explained)
