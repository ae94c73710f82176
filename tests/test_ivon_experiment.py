"""IVON reaches a posterior that is known, and the experiment makes its table."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from experiments.ivon.__main__ import main
from experiments.ivon.ivon import Ivon
from varshare_rl.nn import VarShareLayer
from varshare_rl.ops.gaussian import softplus_sigma

TASKS, ROWS, FEATURES, NOISE, PRIOR = 3, 32, 4, 0.2, 0.05


def test_ivon_reaches_the_posterior_of_a_regression() -> None:
    """``y = x phi_i + noise`` with orthogonal inputs: precision ``1 / p^2 + n / s^2``, entry by entry."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(TASKS, ROWS, FEATURES))
    x = basis * ROWS**0.5
    y = x @ (PRIOR * torch.randn(TASKS, FEATURES, 1)) + NOISE * torch.randn(TASKS, ROWS, 1)
    layer = VarShareLayer(FEATURES, 1, TASKS, prior_scale=PRIOR, bias=False)
    torch.nn.init.zeros_(layer.theta)
    ivon, cost = Ivon(layer, rate=0.1, beta_2=0.998, bound=1.0), torch.full((TASKS,), 1.0 / ROWS)
    kept = []
    for number in range(6000):
        losses = (y - layer(x, torch.arange(TASKS))).square().mean((1, 2)) / (2 * NOISE**2)
        losses.sum().backward()
        ivon.step(cost)
        if number >= 3000:
            kept.append((layer.mus.detach().clone(), softplus_sigma(layer.rhos).detach()))
    mus, sigmas = (torch.stack(parts).mean(0) for parts in zip(*kept, strict=True))
    precision = 1 / PRIOR**2 + ROWS / NOISE**2
    exact = (x.transpose(1, 2) @ y / NOISE**2 / precision).transpose(1, 2)
    assert (sigmas * precision**0.5 - 1).abs().max() < 0.1
    assert ((mus - exact).abs() * precision**0.5).max() < 0.1


@pytest.mark.slow
def test_the_command_makes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["env.envs_per_task=2", "network.hidden=[8]", "algorithm.rollout_transitions_per_task=40"]
    tiny += ["algorithm.minibatches=2", "algorithm.epochs=2", "total_transitions=1280", "evaluate.every=640"]
    ways = ["--ways", "adam", "ivon rate=0.1", "--weights", "0.1", "--seeds", "0"]
    folders = ["--runs", str(tmp_path / "runs"), "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ivon", *tiny, "evaluate.episodes=2", *ways, *folders])
    main()
    rows = list(csv.DictReader((tmp_path / "ivon.csv").read_text().splitlines()))
    assert [row["factors"] for row in rows] == ["adam", "ivon rate=0.1"]
    assert float(rows[1]["nats"]) > 10 * float(rows[0]["nats"])  # begins narrower than its prior
