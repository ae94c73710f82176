from __future__ import annotations

import pytest
import torch
from torch import nn

from varshare_rl.nn import (
    IndependentConfig,
    L2SoftConfig,
    LoRAConfig,
    MOOREConfig,
    PaCoConfig,
    Posterior,
    SharedConfig,
    VarShareConfig,
    VarShareLoRAConfig,
)
from varshare_rl.optim.optimizer import Kind, OptimizerConfig, Schedule, roles, schedule_factor
from varshare_rl.optim.step import LossStep

LINEAR = OptimizerConfig(schedule=Schedule.linear)
WARM = OptimizerConfig(schedule=Schedule.linear, warmup=0.2, final_rate=0.1)
COSINE = OptimizerConfig(schedule=Schedule.cosine, final_rate=0.2)
LATE = OptimizerConfig(schedule=Schedule.linear, warmup=0.2, decay_start=0.6, final_rate=0.1)


@pytest.mark.parametrize(
    ("options", "fraction", "factor"),
    [
        (OptimizerConfig(), 0.0, 1.0),
        (OptimizerConfig(), 1.0, 1.0),
        (OptimizerConfig(warmup=0.5), 0.25, 0.5),
        (OptimizerConfig(warmup=0.5), 0.75, 1.0),
        (LINEAR, 0.0, 1.0),
        (LINEAR, 0.25, 0.75),
        (LINEAR, 1.0, 0.0),
        (LINEAR, 1.1, 0.0),  # the last vector step may pass the budget
        (WARM, 0.1, 0.5),
        (WARM, 0.2, 1.0),
        (WARM, 0.6, 0.55),
        (WARM, 1.0, 0.1),
        (COSINE, 0.0, 1.0),
        (COSINE, 0.5, 0.6),
        (COSINE, 0.25, 0.2 + 0.8 * (1 + 0.5**0.5) / 2),
        (COSINE, 1.0, 0.2),
        (LATE, 0.1, 0.5),
        (LATE, 0.4, 1.0),
        (LATE, 0.6, 1.0),
        (LATE, 0.8, 0.55),
        (LATE, 1.0, 0.1),
        (OptimizerConfig(schedule=Schedule.linear, warmup=0.5, decay_start=0.25), 0.75, 0.5),  # not before warm
    ],
)
def test_schedules_by_hand(options: OptimizerConfig, fraction: float, factor: float) -> None:
    assert schedule_factor(options, fraction) == pytest.approx(factor, abs=1e-12)


def step_of(options: OptimizerConfig, network: nn.Module | None = None) -> LossStep:
    network = network or VarShareLoRAConfig(hidden=[4], layer_norm=True).build(3, 2, 2, Posterior())
    return LossStep(network, 0.01, 0.0, optimizer=options)


def moves(step: LossStep, fraction: float | None = None) -> dict[Kind, float]:
    """How far the first step moves the parameters of each kind: Adam's first step is its rate."""
    before = [parameter.detach().clone() for parameter in step.parameters]
    if fraction is not None:
        step.advance(fraction)
    loss = torch.stack([sum((p * torch.randn_like(p)).sum() for p in step.parameters)] * 2)  # type: ignore[arg-type]
    step(loss)
    found = {}
    for role, old in zip(step.roles, before, strict=True):
        found[role.kind] = float((role.parameter.detach() - old).abs().max())
    return found


def test_rates_of_theta_mus_and_rhos() -> None:
    found = moves(step_of(OptimizerConfig(mu_lr_scale=0.5, rho_lr_scale=3.0)))
    assert found == pytest.approx({Kind.theta: 0.01, Kind.mu: 0.005, Kind.rho: 0.03}, rel=1e-3)


def test_a_rate_of_zero_holds_what_it_is_for() -> None:
    assert moves(step_of(OptimizerConfig(rho_lr_scale=0.0)))[Kind.rho] == 0.0


def test_the_schedule_drives_every_rate() -> None:
    options = OptimizerConfig(mu_lr_scale=0.5, rho_lr_scale=1.0, adapter_epsilon=None, schedule=Schedule.linear)
    found = moves(step_of(options), fraction=0.75)
    assert found == pytest.approx({Kind.theta: 0.0025, Kind.mu: 0.00125, Kind.rho: 0.0025}, rel=1e-3)
    step = step_of(options)
    for fraction in (0.9, 0.5):  # a function of the fraction, whatever came before
        step.advance(fraction)
    assert [group["lr"] for group in step.optimizer.param_groups] == pytest.approx([0.005, 0.0025])


def test_weight_decay_by_hand_and_on_weights_only() -> None:
    network = VarShareLoRAConfig(hidden=[4], layer_norm=True).build(3, 2, 2, Posterior())
    step = step_of(OptimizerConfig(weight_decay=0.5), network)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    step(torch.stack([0.0 * parameter.sum() for parameter in network.parameters()][:1] * 2))  # a gradient of zero
    first = next(iter(before))
    assert first == "layers.0.theta"
    torch.testing.assert_close(network.layers[0].theta, before[first] * (1 - 0.01 * 0.5))
    decays = {name for name, role in zip(before, roles(network), strict=True) if role.decays}
    assert decays == {"layers.0.theta", "layers.1.theta"}


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (SharedConfig(hidden=[4], layer_norm=True), {"theta": "theta, decays", "bias": "theta", "weight": "theta"}),
        (VarShareConfig(hidden=[4]), {"theta": "theta, decays", "bias": "theta", "mus": "mu", "rhos": "rho"}),
        (IndependentConfig(hidden=[4]), {"weights": "heads, decays", "biases": "heads"}),
        (
            PaCoConfig(hidden=[4], layer_norm=True),
            {
                "compositions": "heads", "weights": "theta, decays", "biases": "theta",
                "weight": "theta", "bias": "theta",
            },
        ),
        (
            MOOREConfig(hidden=[4, 4], layer_norm=True, experts=2, multi_head=False),
            {
                "mixtures": "heads", "weights": "theta, decays", "biases": "theta", "scales": "theta",
                "offsets": "theta", "weight": "theta", "bias": "theta", "theta": "theta, decays",
            },
        ),
    ],
)  # fmt: skip
def test_roles(
    network: SharedConfig | VarShareConfig | IndependentConfig | PaCoConfig | MOOREConfig, expected: dict[str, str]
) -> None:
    built = network.build(3, 2, 2, Posterior())
    found = {}
    for (name, parameter), role in zip(built.named_parameters(), roles(built), strict=True):
        assert role.parameter is parameter
        own = {"mus", "rhos", "compositions", "mixtures"}
        own |= {"weights", "biases"} if isinstance(network, IndependentConfig) else set()
        assert role.own == (name.rpartition(".")[2] in own)
        found[name.rpartition(".")[2]] = role.kind.value + (", decays" if role.decays else "")
    assert found == expected


def test_without_options_there_are_three_groups_and_adam() -> None:
    step = step_of(OptimizerConfig())
    assert type(step.optimizer) is torch.optim.Adam
    groups = {(group["lr"], group["eps"]) for group in step.optimizer.param_groups}
    assert groups == {(0.01, 1e-8), (0.01, 1e-15), (0.01 * 30, 1e-15)}  # theta, mu, rho
    assert step.optimizer.defaults["fused"]


def test_frozen_parameters_are_not_trained() -> None:
    network = SharedConfig(hidden=[4]).build(3, 2, 2, Posterior())
    network.layers[0].requires_grad_(False)
    assert len(LossStep(network, 0.1, 0.0).parameters) == 2


def test_checkpoints_of_when_independent_networks_shared_their_norms_go_on() -> None:
    """Every task takes over the norm, and the moments, that all had."""
    options = IndependentConfig(hidden=[4], layer_norm=True)
    network, x = options.build(3, 2, 2, Posterior()), torch.randn(2, 5, 3)
    step = LossStep(network, 0.01, 0.0)
    step(network(x, torch.arange(2)).square().mean((1, 2)))
    weights, optimizer = network.state_dict(), step.state()
    for index, (name, former) in enumerate([("scales", "weight"), ("offsets", "bias")], start=len(weights) - 2):
        weights[f"norms.0.{former}"] = weights.pop(f"norms.0.{name}")[1]
        moments = optimizer["optimizer"]["state"][index]
        optimizer["optimizer"]["state"][index] = moments | {
            key: moments[key][1] for key in ("exp_avg", "exp_avg_sq")
        }
    again = options.build(3, 2, 2, Posterior())
    again.load_state_dict(weights)
    resumed = LossStep(again, 0.01, 0.0)
    resumed.load_state(optimizer)
    for norm in ("norms.0.scales", "norms.0.offsets"):
        parameter = again.get_parameter(norm)
        assert torch.equal(parameter, network.get_parameter(norm)[1].expand(2, 4))
        moment = resumed.optimizer.state[parameter]["exp_avg"]
        assert torch.equal(moment, step.optimizer.state[network.get_parameter(norm)]["exp_avg"][1].expand(2, 4))
    resumed(again(x, torch.arange(2)).square().mean((1, 2)))
    assert all(torch.isfinite(parameter).all() for parameter in again.parameters())


@pytest.mark.parametrize("kind", [LoRAConfig, L2SoftConfig, VarShareLoRAConfig])
def test_lora_plus_gives_b_a_rate_of_its_own(kind: type) -> None:
    network = kind(hidden=[4]).build(3, 2, 2, Posterior())
    options = OptimizerConfig(b_lr_ratio=16.0, mu_lr_scale=0.5, rho_lr_scale=0.25)
    step = LossStep(network, 0.01, 0.0, optimizer=options)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    step.optimizer.step()
    moved = {
        name: float((parameter.detach() - before[name]).abs().mean())
        for name, parameter in network.named_parameters()
    }
    for name, distance in moved.items():
        rate = 0.01 * (0.25 if "rhos" in name else 0.5 if name.endswith(("_A", "_B")) else 1.0)
        if name.endswith("_B") and "rhos" not in name:
            rate *= 16.0
        assert distance == pytest.approx(rate, rel=1e-3), name
