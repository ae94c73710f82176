from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from varshare_rl.nn import Posterior, VarShareConfig, VarShareLoRAConfig
from varshare_rl.optim.priors import AdaptivePriorConfig, FixedPriorConfig, LearnedPriorConfig

TASKS = 4


def network(full_rank: bool = False) -> nn.Module:
    torch.manual_seed(1)
    options = VarShareConfig(hidden=[5]) if full_rank else VarShareLoRAConfig(hidden=[5], rank=2)
    made = options.build(3, 2, TASKS, Posterior(prior_scale=0.1)).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "mus" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            elif "rhos" in name:
                parameter.copy_(torch.randn_like(parameter) - 2.0)
    return made


def no_gap() -> Tensor:
    raise AssertionError("nobody asked for the gap")


def scales(module: nn.Module) -> list[list[float]]:
    return [layer.prior_scale.tolist() for layer in module.layers]


def test_fixed_stays() -> None:
    module = network()
    before = scales(module)
    prior = FixedPriorConfig().build(0.1, TASKS)
    prior.step([module], no_gap)
    assert scales(module) == before
    assert prior.metrics([module]) == {}


@pytest.mark.parametrize("full_rank", [False, True])
def test_learned_converges_to_the_root_of_the_mean_second_moment(full_rank: bool) -> None:
    """Empirical Bayes in closed form: ``p^2 = mean(mu^2 + sigma^2)`` over tasks and entries of a layer."""
    module = network(full_rank)
    prior = LearnedPriorConfig(rate=0.05, spring=0.0, interval=1).build(0.1, TASKS)
    for _ in range(500):
        prior.step([module], no_gap)
    for layer in module.layers:
        squares = [
            (mu.square() + nn.functional.softplus(rho).square()).flatten(1) for mu, rho in layer.posteriors()
        ]
        optimum = torch.cat(squares, 1).mean().sqrt().item()
        assert layer.prior_scale.tolist() == pytest.approx([optimum] * TASKS, rel=1e-6)
        assert optimum != pytest.approx(0.1, rel=0.1)
        at_optimum = layer.kl().sum().item()  # no scale near it has less divergence: the layer does use it
        for factor in (0.95, 1.05):
            layer.log_prior_scale.fill_(math.log(optimum * factor))
            assert layer.kl().sum().item() > at_optimum


def test_learned_step_is_the_gradient_of_the_divergence() -> None:
    module = network()
    layer = module.layers[0]
    log_scale = torch.tensor(math.log(0.4), dtype=torch.float64, requires_grad=True)
    layer.log_prior_scale = log_scale.expand(TASKS)
    entries = sum(mu[0].numel() for mu, _ in layer.posteriors())
    objective = layer.kl().mean() / entries + 0.5 * 0.3 * (log_scale - math.log(0.1)).square()
    (gradient,) = torch.autograd.grad(objective, log_scale)
    assert abs(float(gradient)) < 1.0
    layer.log_prior_scale = log_scale.detach().repeat(TASKS)
    LearnedPriorConfig(rate=0.01, spring=0.3, interval=1).build(0.1, TASKS).step([module], no_gap)
    expected = float(log_scale.detach() - 0.01 * gradient)
    assert layer.log_prior_scale.tolist() == pytest.approx([expected] * TASKS, rel=1e-12)


def test_the_spring_holds_learned_scales_back() -> None:
    reached = []
    for spring in (0.0, 1.0, 100.0):
        module = network()
        prior = LearnedPriorConfig(rate=0.01, spring=spring, interval=1).build(0.1, TASKS)
        for _ in range(400):
            prior.step([module], no_gap)
        reached.append(module.layers[0].prior_scale[0].item())
    assert reached[0] > reached[1] > reached[2]
    assert reached[2] == pytest.approx(0.1, rel=0.15)


def test_learned_moves_at_every_nth_update_and_reports() -> None:
    module = network()
    prior = LearnedPriorConfig(interval=3).build(0.1, TASKS)
    before = scales(module)
    prior.step([module], no_gap)
    prior.step([module], no_gap)
    assert scales(module) == before
    prior.step([module], no_gap)
    assert scales(module) != before
    metrics = prior.metrics([module])
    assert metrics["prior_scale_least"] <= metrics["prior_scale"] <= metrics["prior_scale_most"]


def test_adaptive_by_hand() -> None:
    module = network()
    prior = AdaptivePriorConfig(interval=1, smoothing=0.5).build(1.0, TASKS)
    prior.step([module], lambda: torch.tensor([1.0, 2.0, 3.0, 10.0]))
    middle, deviation = 2.5, 1.4826 * 1.0  # absolute deviations 1.5, 0.5, 0.5, 7.5
    expected = [0.01 + 0.29 / (1 + math.exp(-(gap - middle) / deviation)) for gap in (1.0, 2.0, 3.0, 10.0)]
    for layer in module.layers:
        assert layer.prior_scale.tolist() == pytest.approx(expected, rel=1e-5)
    prior.step([module], lambda: torch.tensor([3.0, 2.0, 3.0, 0.0]))  # averages 2, 2, 3, 5
    assert prior.metrics([module])["loss_gap"] == pytest.approx(3.0)
    assert module.layers[0].prior_scale[3] > module.layers[0].prior_scale[2] > module.layers[0].prior_scale[0]


def test_a_gap_that_is_not_finite_is_no_other_tasks_business() -> None:
    module = network()
    prior, other = (
        AdaptivePriorConfig(interval=1, smoothing=0.5).build(1.0, tasks) for tasks in (TASKS, TASKS - 1)
    )
    for bad in (math.nan, math.inf):
        prior.step([module], lambda: torch.tensor([1.0, 2.0, 4.0, bad]))  # noqa: B023
        other.step([], lambda: torch.tensor([1.0, 2.0, 4.0]))
        for layer in module.layers:
            assert layer.prior_scale[:3].tolist() == pytest.approx(other.scales().tolist())
            assert layer.prior_scale[3].item() == pytest.approx(0.155)  # as the median has
    assert prior.metrics([module])["loss_gap"] == pytest.approx(7 / 3)
    prior.step([module], lambda: torch.tensor([1.0, 2.0, 4.0, 9.0]))
    assert prior.gap[3] == 9.0
    prior.step([module], lambda: torch.tensor([1.0, 2.0, 4.0, math.nan]))
    assert prior.gap[3] == 9.0


def test_adaptive_asks_for_the_gap_only_when_it_is_due() -> None:
    module = network()
    prior = AdaptivePriorConfig(interval=2).build(1.0, TASKS)
    prior.step([module], no_gap)
    assert prior.metrics([module]) == {}
    prior.step([module], lambda: torch.zeros(TASKS))
    assert module.layers[0].prior_scale.tolist() == pytest.approx([0.155] * TASKS)


@pytest.mark.parametrize("options", [LearnedPriorConfig(interval=2), AdaptivePriorConfig(interval=2)])
def test_state_round_trip(options: LearnedPriorConfig | AdaptivePriorConfig) -> None:
    one_module, other_module = network(), network()
    one, other = options.build(0.1, TASKS), options.build(0.1, TASKS)

    def gap() -> Tensor:
        return torch.tensor([1.0, 4.0, 2.0, -3.0])

    for _ in range(3):
        one.step([one_module], gap)
    other.load_state(one.state())
    other_module.load_state_dict(one_module.state_dict())
    for _ in range(3):
        one.step([one_module], gap)
        other.step([other_module], gap)
    assert scales(one_module) == scales(other_module)
