from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from varshare_rl.nn import Posterior, VarShareLoRAConfig
from varshare_rl.nn.layer import TaskModule
from varshare_rl.nn.parameters import total_kl
from varshare_rl.nn.variational import noise_to_weight
from varshare_rl.optim.elbo import Elbo, ElboConfig, KLNormalization
from varshare_rl.optim.kl_schedules import (
    BandConfig,
    ConstantConfig,
    DualConfig,
    FreeBitsConfig,
    KLSchedule,
    RampConfig,
)

TASKS = 3
SCHEDULES = [ConstantConfig(), RampConfig(), BandConfig(interval=1), DualConfig(), FreeBitsConfig()]


def network(prior_scale: float = 1.0, sigma: float = 0.0067) -> nn.Module:
    torch.manual_seed(0)
    made = VarShareLoRAConfig(hidden=[6], rank=2).build(4, 2, TASKS, Posterior(prior_scale=prior_scale))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "rhos" in name:
                parameter.fill_(math.log(math.expm1(sigma)))
    return made


def nats(*values: float) -> Tensor:
    return torch.tensor(values)


def test_constant() -> None:
    schedule = ConstantConfig().build(0.3, TASKS)
    assert schedule.weight == 0.3
    schedule.step(nats(1.0, 2.0, 4.0), {"network": network()})
    schedule.advance(0.7)
    assert schedule.metrics() == {"kl_weight": 0.3}


@pytest.mark.parametrize(
    ("fraction", "weight"),
    [(0.0, 0.0), (0.05, 0.25), (0.1, 0.5), (0.5, 0.5), (0.8, 0.5), (0.9, 0.75), (1.0, 1.0), (1.2, 1.0)],
)
def test_ramp_rises_holds_and_rises_again(fraction: float, weight: float) -> None:
    schedule = RampConfig().build(0.5, TASKS)
    schedule.advance(fraction)
    assert schedule.metrics()["kl_weight"] == pytest.approx(weight)


def test_ramp_without_its_ends_is_constant() -> None:
    schedule = RampConfig(warmup=0.0, late=0.0).build(0.5, TASKS)
    for fraction in (0.0, 0.5, 1.0):
        schedule.advance(fraction)
        assert schedule.metrics()["kl_weight"] == 0.5


class Costly(TaskModule):
    """A layer whose weights cost the given nats."""

    penalized = True

    def __init__(self, nats: Tensor) -> None:
        super().__init__()
        self.nats = nats

    def kl(self) -> Tensor:
        return self.nats


def test_free_bits_cost_nothing() -> None:
    given = nats(4.0, 10.0, 30.0).requires_grad_()
    schedule = FreeBitsConfig(free_nats=10.0)
    elbo = Elbo(ElboConfig(kl_weight=0.5, normalization=KLNormalization.none, schedule=schedule), TASKS)
    penalty = torch.as_tensor(elbo.penalty(Costly(given), 1))
    torch.testing.assert_close(penalty, nats(0.0, 0.0, 10.0))
    penalty.sum().backward()  # type: ignore[no-untyped-call]
    assert given.grad is not None
    assert given.grad[[0, 2]].tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("sigma", "prior_scale", "moves"),
    [
        (0.0067, 1.0, "up"),  # too quiet, and the prior is wide: more weight widens
        (0.0067, 0.001, "down"),  # too quiet, and the prior is narrower still: less weight lets it widen
        (1.0, 0.01, "up"),  # too loud, and the prior is narrow: more weight narrows
        (0.5, 3.0, "down"),  # too loud, and the prior is wider still: less weight lets it narrow
        (0.11, 1.0, "stays"),
    ],
)
def test_band_moves_towards_the_band_from_both_sides(sigma: float, prior_scale: float, moves: str) -> None:
    module = network(prior_scale, sigma)
    ratio, _ = noise_to_weight([module])
    schedule = BandConfig(low=0.05, high=0.2, interval=1).build(0.1, TASKS)
    schedule.step(nats(1.0, 1.0, 1.0), {"network": module})
    after = schedule.metrics()["kl_weight"]
    assert after == pytest.approx({"up": 0.11, "down": 0.1 / 1.1, "stays": 0.1}[moves])
    assert (0.05 <= ratio <= 0.2) == (moves == "stays")
    assert schedule.metrics()["noise_to_weight"] == pytest.approx(ratio)


@pytest.mark.parametrize(("sigma", "prior_scale"), [(0.0067, 1.0), pytest.param(0.6, 0.05, marks=pytest.mark.slow)])
def test_band_brings_the_spread_of_a_trained_posterior_into_the_band(sigma: float, prior_scale: float) -> None:
    """The other force is a quadratic loss that pulls every rho to where the spread is outside the band."""
    module = network(prior_scale, sigma)
    elbo = Elbo(ElboConfig(kl_weight=1e-2, schedule=BandConfig(low=0.05, high=0.2, interval=10)), TASKS)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    rhos = [parameter for name, parameter in module.named_parameters() if "rhos" in name]
    home = math.log(math.expm1(sigma))
    for _ in range(3000):
        optimizer.zero_grad()
        pull = sum((rho - home).square().sum() for rho in rhos)
        (torch.as_tensor(elbo.penalty(module, 1)).sum() + pull).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        elbo.step({"network": module}, lambda: torch.zeros(TASKS))
    ratio, _ = noise_to_weight([module])
    assert 0.04 < ratio < 0.24


def test_band_looks_at_every_nth_update_and_smooths() -> None:
    schedule = BandConfig(interval=3, smoothing=0.25).build(0.1, TASKS)
    modules = {"network": network()}
    for expected in (0.1, 0.1, 0.11, 0.11, 0.11, 0.121):
        schedule.step(nats(1.0), modules)
        assert schedule.metrics()["kl_weight"] == pytest.approx(expected)
    first = schedule.metrics()["noise_to_weight"]
    louder = {"network": network(sigma=0.5)}
    now, _ = noise_to_weight(louder.values())
    for _ in range(3):
        schedule.step(nats(1.0), louder)
    assert schedule.metrics()["noise_to_weight"] == pytest.approx(first + 0.25 * (now - first))


@pytest.mark.parametrize(
    ("per_task", "budget"),
    [
        (True, 20.0),
        pytest.param(False, 60.0, marks=pytest.mark.slow),
        pytest.param(False, 20.0, marks=pytest.mark.slow),
        pytest.param(True, 60.0, marks=pytest.mark.slow),
    ],
)
def test_dual_holds_its_budget_against_a_loss_that_wants_more(per_task: bool, budget: float) -> None:
    module = network()
    schedule = DualConfig(budget_nats=budget, per_task=per_task)
    elbo = Elbo(ElboConfig(kl_weight=0.01, schedule=schedule), TASKS)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    targets = [torch.randn_like(layer.mus_B) * 5 for layer in module.layers]
    for _ in range(2500):
        optimizer.zero_grad()
        misfit = sum(
            (layer.mus_B - target).square().sum() for layer, target in zip(module.layers, targets, strict=True)
        )
        (torch.as_tensor(elbo.penalty(module, 1)).sum() + misfit).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        elbo.step({"network": module}, lambda: torch.zeros(TASKS))
    held = total_kl(module, TASKS).detach()
    assert float(held.mean()) == pytest.approx(budget, rel=0.05)
    if per_task:
        assert held.tolist() == pytest.approx([budget] * TASKS, rel=0.05)
    else:
        assert (held / budget - 1).abs().max() > 0.05  # tasks keep their differences


def test_dual_by_hand() -> None:
    schedule = DualConfig(budget_nats=100.0, rate=0.1, gain=0.5).build(0.2, 2)
    schedule.step(nats(100.0, 100.0), {})
    assert schedule.metrics()["kl_weight"] == pytest.approx(0.2)
    schedule.step(nats(140.0, 100.0), {})  # mean 120
    expected = 0.2 * 1.2**0.1 * 1.2**0.5
    assert schedule.metrics()["kl_weight"] == pytest.approx(expected)
    assert schedule.weight == pytest.approx([expected] * 2)
    schedule.step(nats(1e6, 1e6), {})  # counts as 20 % above the budget in the multiplier
    expected = 0.2 * 1.2**0.1 * 1.2**0.1 * 1e4**0.5
    assert schedule.metrics()["kl_weight"] == pytest.approx(expected)


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: options.name)
def test_state_round_trip(options: Any) -> None:
    one, other = options.build(0.02, TASKS), options.build(0.02, TASKS)
    modules = {"network": network()}

    def go_on(schedule: KLSchedule, updates: int) -> Tensor:
        for update in range(updates):
            schedule.advance(update / 10)
            schedule.step(nats(600.0, 800.0 + update, 1200.0), modules)
        return torch.as_tensor(schedule.weight)

    go_on(one, 5)
    other.load_state(one.state())
    assert torch.equal(go_on(one, 5), go_on(other, 5))
    assert one.metrics() == other.metrics()


def test_no_controller_moves_without_posteriors() -> None:
    elbo = Elbo(ElboConfig(schedule=BandConfig(interval=1)), TASKS)
    plain = nn.Linear(3, 2)
    assert elbo.penalty(plain, 10) == 0.0
    elbo.step({"network": plain}, lambda: torch.zeros(TASKS))
    assert math.isnan(elbo.metrics({"network": plain})["elbo/noise_to_weight"])


def test_a_price_is_where_its_network_is() -> None:
    module = network()
    elbo = Elbo(ElboConfig(schedule=DualConfig()), TASKS)
    assert torch.as_tensor(elbo.price(module, 10)).device.type == "cpu"
    assert torch.as_tensor(elbo.price(module.to("meta"), 10)).device.type == "meta"


@pytest.mark.parametrize("schedule", [ConstantConfig(), FreeBitsConfig(), RampConfig()])
def test_a_weight_that_nothing_moves_is_that_of_the_options(schedule: Any) -> None:
    before, after = (Elbo(ElboConfig(kl_weight=weight, schedule=schedule), 2) for weight in (0.1, 1.0))
    for elbo in (before, after):
        elbo.advance(0.5)
    weight = after.schedule.weight
    after.load_state(before.state())
    assert after.schedule.weight == weight != before.schedule.weight
