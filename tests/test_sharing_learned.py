"""What the divergence does in agents that really learn: budgets are held, and sharing shows where tasks differ."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from conftest import Command

from varshare_rl.assemble import build_algorithm, load_agent
from varshare_rl.config import Device
from varshare_rl.nn.parameters import total_kl
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.ops.gaussian import softplus_sigma

QUIET = (
    "evaluate.every=0",
    "evaluate.episodes=16",
    "log.quiet=true",
    "observe.every=0",
    "device=cpu",
    "run_dir=run",
)


def train(command: Command, *overrides: str) -> dict[str, Any]:
    outcome = command("train", *overrides, *QUIET)
    assert outcome.code == 0, outcome.err
    summary: dict[str, Any] = json.loads(Path("run/summary.json").read_text())
    return summary


def test_posteriors_start_at_their_priors_and_move_with_the_default_step(command: Command) -> None:
    summary = train(command, "env=pointmass", "total_transitions=24000", "log.every=4000", "evaluate.episodes=1")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    steps = [line["optimizer/actor_rho_step"] for line in lines if "optimizer/actor_rho_step" in line]
    assert min(steps) > 0.03  # before: 0.003
    agent = load_agent(Path("run"), "last", Device.cpu)
    fresh = build_algorithm(agent.config, agent.suite, torch.device("cpu"))
    start, end = (
        torch.cat([
            (softplus_sigma(rho) / layer.prior_scale.view(-1, 1, 1)).detach().flatten()
            for _, layer in stochastic_layers(algorithm.trained_modules()["actor"])
            for _, rho in layer.posteriors()
        ])
        for algorithm in (fresh, agent.algorithm)
    )  # fmt: skip
    assert start.sub(1).abs().max() < 1e-3
    assert end.sub(1).abs().quantile(0.9) > 0.02
    nats = [task["kl"] for task in summary["tasks"].values()]
    assert 1 < min(nats) < max(nats) < len(end)


def report(command: Command) -> dict[str, Any]:
    outcome = command("report", "sharing", "run=run")
    assert outcome.code == 0, outcome.err
    document: dict[str, Any] = json.loads(Path("run/report_sharing/sharing.json").read_text())
    return document


@pytest.mark.slow
def test_dual_control_holds_its_budget_while_the_agent_learns(command: Command) -> None:
    summary = train(command, "env=pointmass", "elbo/schedule=dual", "elbo.schedule.budget_nats=6000")
    assert summary["mean_success"] >= 0.85
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    nats = [
        (line["transitions"], mean(value for name, value in line.items() if name.startswith("kl/")))
        for line in lines
        if any(name.startswith("kl/") for name in line)
    ]
    assert nats[0][1] < 3000  # far from it at first
    assert mean(value for at, value in nats if at > 400_000) == pytest.approx(6000, rel=0.15)


@pytest.mark.slow
def test_policies_of_identical_tasks_cost_next_to_nothing(command: Command) -> None:
    summary = train(
        command, "env=cartpole", "env.variant_set=identical", "total_transitions=300000", "elbo.kl_weight=1",
    )  # fmt: skip
    assert summary["mean_return"] > 450
    actor = load_agent(Path("run"), "last", Device.cpu).algorithm.trained_modules()["actor"]
    assert total_kl(actor, 4).mean() < 60  # hundreds where tasks differ; a critic's are those of what it has seen
    assert report(command)["sharing"] > 0.99


@pytest.mark.slow
def test_the_dearest_layer_of_policies_that_conflict_is_the_head(command: Command) -> None:
    summary = train(command, "env=pointmass")
    assert summary["mean_success"] >= 0.85
    document = report(command)
    nats = {layer["name"]: mean(layer["nats"]) for layer in document["layers"]}
    head = "actor.network.layers.2"
    assert nats[head] == max(value for name, value in nats.items() if name.startswith("actor"))
    assert document["clusters"]["count"] > 1
