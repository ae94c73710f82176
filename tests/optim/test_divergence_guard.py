"""A task that diverges is left out, and what the others learn is what they would have learned without it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import hold_noise
from torch import Tensor, nn

from varshare_rl.nn import IndependentConfig, Posterior, VarShareLoRAConfig
from varshare_rl.optim.divergence_guard import TRUSTED_AFTER, DivergenceGuardConfig
from varshare_rl.optim.gradient import MEAN, TEMPERATURE
from varshare_rl.optim.step import LossStep
from varshare_rl.registry import registered

TASKS, BAD = 4, 2
IDS = torch.arange(TASKS)
NAN, INF = float("nan"), float("inf")


def build(name: str, hidden: list[int], rows: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with its weights held, a batch and its targets, always the same."""
    torch.manual_seed(0)
    network = registered("network")[name](hidden=hidden, layer_norm=True).build(5, 3, TASKS, Posterior())
    hold_noise(network)
    return network, torch.randn(TASKS, rows, 5), torch.randn(TASKS, rows, 3)


def in_target(network: nn.Module, x: Tensor, target: Tensor) -> None:
    target[BAD, 0, 0] = NAN


def in_one_observation(network: nn.Module, x: Tensor, target: Tensor) -> None:
    x[BAD, 1, 2] = INF


def in_all_observations(network: nn.Module, x: Tensor, target: Tensor) -> None:
    x[BAD] = NAN


def in_own_parameters(network: nn.Module, x: Tensor, target: Tensor) -> None:
    with torch.no_grad():
        for layer in network.modules():
            for name in getattr(layer, "per_task_parameters", ()):
                layer.get_parameter(name)[BAD] = NAN


def overflow(network: nn.Module, x: Tensor, target: Tensor) -> None:
    target[BAD] = 1e30


def one_step(
    name: str,
    damage: Callable[[nn.Module, Tensor, Tensor], None] | None,
    method: str = MEAN,
    hidden: tuple[int, ...] = (7, 6),
    rows: int = 6,
) -> tuple[nn.Module, LossStep]:
    """A step in which task ``BAD`` is damaged, or, without damage, has no loss."""
    network, x, target = build(name, list(hidden), rows)
    step = LossStep(network, 0.01, 0.0, aggregator=method, num_tasks=TASKS)
    if damage is not None:
        damage(network, x, target)
    losses = 0.5 * (network(x, IDS) - target).square().mean((1, 2))
    if damage is None:
        losses = losses * (IDS != BAD)
    inputs = x.clone()
    norm = step(losses)
    assert torch.isfinite(norm)
    torch.testing.assert_close(x, inputs, rtol=0, atol=0, equal_nan=True)  # the batch is as it was
    return network, step


def assert_same_but_for_the_bad(one: nn.Module, other: nn.Module) -> None:
    stacked = {
        id(layer.get_parameter(name))
        for layer in one.modules()
        for name in getattr(layer, "per_task_parameters", ())
    }
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        if id(mine) in stacked:
            mine, theirs = mine[IDS != BAD], theirs[IDS != BAD]
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "damage", [in_target, in_one_observation, in_all_observations, in_own_parameters, overflow]
)
@pytest.mark.parametrize("name", registered("network"))
def test_the_others_learn_as_if_it_were_not_there(
    name: str, damage: Callable[[nn.Module, Tensor, Tensor], None]
) -> None:
    if damage is in_own_parameters and name == "shared":
        pytest.skip("a shared network has no own parameters")
    network, step = one_step(name, damage)
    assert_same_but_for_the_bad(network, one_step(name, None)[0])
    assert step.divergence_guard.masked is not None
    assert step.divergence_guard.masked.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("name", ["shared", "varshare_lora"])
def test_large_float32_layers(name: str) -> None:
    """The oneDNN products."""
    network, _ = one_step(name, in_all_observations, hidden=(160, 130), rows=70)
    assert_same_but_for_the_bad(network, one_step(name, None, hidden=(160, 130), rows=70)[0])


@pytest.mark.parametrize("method", [name for name in registered("gradient") if name not in (MEAN, TEMPERATURE)])
def test_combiners_leave_it_out(method: str) -> None:
    network, step = one_step("varshare_lora", in_all_observations, method)
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())
    assert step.divergence_guard.masked is not None
    assert step.divergence_guard.masked.tolist() == [0, 0, 1, 0]


def test_without_the_guard_everyone_is_lost() -> None:
    """Guards the tests above: the damage is real."""
    network, x, target = build("shared", [7, 6], 6)
    in_target(network, x, target)
    step = LossStep(network, 0.01, 0.0, divergence_guard=DivergenceGuardConfig(non_finite=False))
    step((network(x, IDS) - target).square().mean((1, 2)))
    assert not any(torch.isfinite(parameter).all() for parameter in network.parameters())


def test_a_healthy_step_is_not_touched() -> None:
    networks = []
    for divergence_guard in (True, False):
        network, x, target = build("varshare_lora", [7, 6], 6)
        step = LossStep(network, 0.01, 0.5, divergence_guard=DivergenceGuardConfig(non_finite=divergence_guard))
        for _ in range(3):
            step((network(x, IDS) - target).square().mean((1, 2)))
        networks.append(list(network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*networks, strict=True))


def test_a_gradient_that_is_not_finite_under_losses_that_are_makes_no_step() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    step = LossStep([parameter], 0.1, 0.0)
    step(torch.stack([parameter[0].sqrt(), parameter[1] + 1.0]))  # the slope of a root at 0
    assert torch.equal(parameter, torch.zeros(2))
    assert step.divergence_guard.masked is not None
    assert step.divergence_guard.masked.tolist() == [1, 1]  # nobody in particular
    step(torch.stack([parameter[1], parameter[1]]))
    assert parameter[1].item() == pytest.approx(-0.1)


def explode(losses: list[float], options: DivergenceGuardConfig) -> list[int]:
    """Steps that each of two tasks was left out of; the second has a loss of 1 throughout."""
    parameter = nn.Parameter(torch.zeros(2))
    step = LossStep([parameter], 0.0, 0.0, divergence_guard=options)
    for loss in losses:
        step(parameter + torch.tensor([loss, 1.0]))
    return [0, 0] if step.divergence_guard.masked is None else step.divergence_guard.masked.tolist()


def test_an_explosion_is_measured_by_the_running_loss() -> None:
    calm = [2.0] * TRUSTED_AFTER
    options = DivergenceGuardConfig(explosion=10.0)
    assert explode([*calm, 19.0, -19.0], options) == [0, 0]
    assert explode([*calm, 25.0, -25.0, 2.0, 25.0], options) == [3, 0]  # those left out do not move it
    assert explode([*calm, 1e9], DivergenceGuardConfig()) == [0, 0]  # off by default
    assert explode([1e9, *calm], options) == [0, 0]  # not trusted yet
    assert explode([*calm, NAN, 25.0], DivergenceGuardConfig(False, 10.0)) == [2, 0]


def test_a_loss_that_stays_at_a_new_level_counts_again() -> None:
    calm, options = [2.0] * TRUSTED_AFTER, DivergenceGuardConfig(explosion=10.0)
    # 39 is 1.95 times the bound: log2(1.95) of 100 steps, the next whole one, and calm from then on
    assert explode([*calm, *[39.0] * 97], options) == [97, 0]
    assert explode([*calm, *[39.0] * 400], options) == [97, 0]
    # what doubles in less than 100 steps is never caught up with
    assert explode([*calm, *(30.0 * 2.0 ** (n / 50.0) for n in range(300))], options) == [300, 0]
    assert explode([*calm, *[INF] * 300, 25.0], options) == [301, 0]  # what is not finite is no level


def test_a_task_without_a_finite_loss_so_far_has_no_explosion() -> None:
    options = DivergenceGuardConfig(explosion=10.0)
    assert explode([*[NAN] * (TRUSTED_AFTER + 10), 5.0, 5.0, 60.0], options) == [TRUSTED_AFTER + 11, 0]


def test_the_state_goes_on() -> None:
    options = DivergenceGuardConfig(explosion=10.0)
    parameter = nn.Parameter(torch.zeros(2))
    step = LossStep([parameter], 0.0, 0.0, divergence_guard=options)
    for _ in range(TRUSTED_AFTER):
        step(parameter + 1.0)
    step(parameter + torch.tensor([1.0, INF]))
    again = LossStep([parameter], 0.0, 0.0, divergence_guard=options)
    again.load_state(step.state())
    again(parameter + torch.tensor([20.0, 1.0]))
    assert again.divergence_guard.masked is not None
    assert again.divergence_guard.masked.tolist() == [1, 1]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_on_a_device_the_step_is_dropped_until_somebody_looks(bad: float) -> None:
    """The path of CUDA, where a step does not wait: played on the CPU."""
    network = IndependentConfig(hidden=[]).build(1, 1, 2, Posterior())
    step = LossStep(network, 0.1, 0.0)
    step.on_cpu = step.divergence_guard.on_cpu = False
    before = [parameter.detach().clone() for parameter in network.parameters()]
    x = torch.ones(2, 1, 1)

    def losses(factor: float) -> Tensor:
        return network(x, torch.arange(2)).sum((1, 2)) * torch.tensor([1.0, factor])

    step(losses(bad))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert step.divergence_guard.masked is not None
    assert step.divergence_guard.masked.tolist() == [0, 1]
    assert not step.divergence_guard.looking
    step.advance(0.5)
    assert step.divergence_guard.looking
    step(losses(bad))  # now it looks, and the other goes on
    assert step.divergence_guard.masked.tolist() == [0, 2]
    weights = network.layers[0].weights
    assert weights[0].item() == pytest.approx(before[0][0].item() - 0.1)
    assert weights[1].item() == before[0][1].item()
    step.advance(0.6)
    step(losses(1.0))
    step.advance(0.7)
    assert not step.divergence_guard.looking
    assert math.isfinite(weights[1].item())
    assert weights[1].item() != before[0][1].item()


def test_the_graph_of_a_low_rank_layer_is_left_as_it_was() -> None:
    """What was cleaned for a step is put back: here a parameter that is not finite."""
    network = VarShareLoRAConfig(hidden=[4]).build(3, 2, 2, Posterior())
    with torch.no_grad():
        network.layers[0].mus_A[1, 0, 0] = NAN
    step = LossStep(network, 0.1, 0.0)
    step(network(torch.randn(2, 5, 3), torch.arange(2)).square().mean((1, 2)))
    assert torch.isnan(network.layers[0].mus_A[1, 0, 0])
    assert torch.isfinite(network.layers[0].mus_A[0]).all()
