"""Divergences, initial values, growth and the distribution of outputs of the stochastic layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import hold_noise
from naive import scramble
from torch.distributions import Normal, kl_divergence

from varshare_rl.nn import VarShareLayer, VarShareLoRALayer
from varshare_rl.nn.stochastic import WeightNoise

Stochastic = VarShareLoRALayer | VarShareLayer
LAYERS: dict[str, Callable[[float], Stochastic]] = {
    "varshare_lora": lambda prior: VarShareLoRALayer(5, 4, 3, rank=2, prior_scale=prior),
    "varshare": lambda prior: VarShareLayer(5, 4, 3, prior_scale=prior),
}
FACTORS = {"varshare_lora": [("mus_A", "rhos_A"), ("mus_B", "rhos_B")], "varshare": [("mus", "rhos")]}


@pytest.fixture(params=list(LAYERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(name: str, prior: float = 0.8) -> Stochastic:
    layer = LAYERS[name](prior).double()
    layer.log_prior_scale.fill_(math.log(prior))  # to the last bit
    scramble(layer)
    return layer


def test_kl_equals_torch_distributions(name: str) -> None:
    layer = made(name)
    prior = Normal(torch.zeros(1, dtype=torch.float64), 0.8)
    expected = torch.zeros(3, dtype=torch.float64)
    for mus, rhos in FACTORS[name]:
        posterior = Normal(layer.get_parameter(mus), F.softplus(layer.get_parameter(rhos)))
        expected = expected + kl_divergence(posterior, prior).sum((1, 2))
    torch.testing.assert_close(layer.kl(), expected)


def test_kl_equals_monte_carlo(name: str) -> None:
    layer, draws = made(name), 20_000
    log_ratio = torch.zeros(draws, 3, dtype=torch.float64)
    prior = Normal(torch.zeros(1, dtype=torch.float64), 0.8)
    with torch.no_grad():
        for mus, rhos in FACTORS[name]:
            posterior = Normal(layer.get_parameter(mus), F.softplus(layer.get_parameter(rhos)))
            weights = posterior.sample((draws,))
            log_ratio += (posterior.log_prob(weights) - prior.log_prob(weights)).sum((2, 3))
        error = log_ratio.std(0) / math.sqrt(draws)
        difference = (layer.kl() - log_ratio.mean(0)).abs()
    assert (error < 0.02 * layer.kl()).all()  # sharp enough to mean something
    assert (difference < 4 * error).all()


def test_kl_is_zero_exactly_at_the_prior_and_positive_elsewhere(name: str) -> None:
    layer = made(name)
    assert (layer.kl() > 0).all()
    with torch.no_grad():
        for mus, rhos in FACTORS[name]:
            layer.get_parameter(mus).zero_()
            layer.get_parameter(rhos).fill_(math.log(math.expm1(0.8)))
    torch.testing.assert_close(layer.kl(), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    with torch.no_grad():
        layer.get_parameter(FACTORS[name][-1][0])[1, 0, 0] = 0.4
    expected = torch.tensor([0.0, 0.5 * (0.4 / 0.8) ** 2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(layer.kl(), expected, rtol=0, atol=1e-12)


def test_low_rank_layer_starts_as_published() -> None:
    layer = VarShareLoRALayer(200, 100, 6, rank=4)
    assert layer.mus_A.shape == layer.rhos_A.shape == (6, 4, 200)
    assert layer.mus_B.shape == layer.rhos_B.shape == (6, 100, 4)
    assert layer.mus_A.std().item() == pytest.approx(0.01, rel=0.05)
    assert layer.mus_A.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert (layer.mus_B == 0).all()
    assert (layer.rhos_A == -5).all()
    assert (layer.rhos_B == -5).all()
    assert layer.theta.shape == (100, 200)
    assert layer.theta.abs().max().item() <= 1 / math.sqrt(200)
    assert layer.theta.std().item() == pytest.approx(1 / math.sqrt(3 * 200), rel=0.05)
    assert layer.scale == 1.0
    assert VarShareLoRALayer(2, 2, 2, rank=4, alpha=8.0).scale == 2.0
    assert VarShareLoRALayer(2, 2, 2, bias=False).bias is None


def test_full_rank_layer_starts_as_published() -> None:
    layer = VarShareLayer(6, 3, 2)
    assert layer.mus.shape == layer.rhos.shape == (2, 3, 6)
    assert (layer.mus == 0).all()
    assert (layer.rhos == -5).all()


def test_mean_output_of_the_low_rank_layer_is_the_mean_of_the_draws() -> None:
    """E[B A] = mu_B mu_A, since the factors are independent."""
    layer = made("varshare_lora")
    x = torch.randn(5, dtype=torch.float64)
    with torch.no_grad():
        mean = layer.eval()(x.expand(3, 1, 5), torch.arange(3))[:, 0]
        layer.train()
        draws = torch.stack([layer(x.expand(3, 1, 5), torch.arange(3))[:, 0] for _ in range(6_000)])
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - mean).abs() < 4.5 * error).all()


def test_local_reparameterisation_has_the_moments_of_drawn_weights() -> None:
    layer, draws = made("varshare"), 40_000
    x = torch.randn(5, dtype=torch.float64)
    with torch.no_grad():
        local = layer(x.expand(3, draws, 5), torch.arange(3), 0.6)
        sigma = 0.6 * F.softplus(layer.rhos)
        weights = layer.theta + layer.mus + sigma * torch.randn(draws, 3, 4, 5, dtype=torch.float64)
        explicit = (weights @ x + layer.bias).transpose(0, 1)
    error = (explicit.var(1) * 2 / draws).sqrt()
    assert ((local.mean(1) - explicit.mean(1)).abs() < 5 * error).all()
    variance_error = explicit.var(1) * math.sqrt(2.0 / draws)
    assert ((local.var(1) - explicit.var(1)).abs() < 5 * math.sqrt(2) * variance_error).all()
    # a fresh weight per example: neighbouring rows are uncorrelated, as are the outputs of one row
    centred = (local - local.mean(1, keepdim=True)) / local.std(1, keepdim=True)
    assert (centred[:, 1:] * centred[:, :-1]).mean(1).abs().max() < 0.03
    assert (centred[..., 0] * centred[..., 1]).mean(1).abs().max() < 0.03


def test_held_noise_has_the_moments_of_the_posterior(name: str) -> None:
    layer = made(name)
    draws = []
    with torch.no_grad():
        for _ in range(4_000):
            hold_noise(layer)
            assert isinstance(layer.noise, WeightNoise)
            draws.append(torch.cat([noise.flatten() for noise in layer.noise.values]))
    noise = torch.stack(draws)
    assert noise.shape[1] == sum(layer.get_parameter(mus).numel() for mus, _ in FACTORS[name])
    assert noise.mean(0).abs().max() < 5 / math.sqrt(4_000)
    assert (noise.var(0) - 1).abs().max() < 6 * math.sqrt(2 / 4_000)


def test_added_tasks_are_fresh_and_leave_the_others_as_they_were(name: str) -> None:
    layer = made(name).eval()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    before, kl = layer(x, torch.arange(3)), layer.kl()
    assert layer.add_tasks(2) == range(3, 5)
    assert layer.num_tasks == 5
    assert layer.kl().shape == (5,)
    assert torch.equal(layer(x, torch.arange(3)), before)
    torch.testing.assert_close(layer.kl()[:3], kl)
    both = layer(torch.cat([x, x[:2]]), torch.arange(5))
    assert torch.equal(both[:3], before)
    assert torch.equal(both[3:], F.linear(x[:2], layer.theta, layer.bias))
    layer.train()
    y = layer(torch.cat([x, x[:2]]), torch.arange(5))
    (y[4].sum() + layer.kl()[4]).backward()  # the new parameters train
    grad = layer.get_parameter(FACTORS[name][-1][0]).grad
    assert grad is not None
    assert (grad.flatten(1).abs().sum(1) > 0).tolist() == [False, False, False, False, True]
    assert layer.add_tasks() == range(5, 6)


def test_removed_tasks_are_gone_and_the_others_move_up_unchanged(name: str) -> None:
    layer = made(name).eval()
    layer.add_tasks(2)
    scramble(layer)
    x = torch.randn(5, 4, 5, dtype=torch.float64)
    before, kl = layer(x, torch.arange(5)), layer.kl()
    layer.remove_tasks([1, 3])
    assert layer.num_tasks == 3
    kept = torch.tensor([0, 2, 4])
    assert torch.equal(layer(x[kept], torch.arange(3)), before[kept])
    torch.testing.assert_close(layer.kl(), kl[kept])
    with pytest.raises(IndexError, match="unknown task id 3: this network has 3 tasks"):
        layer(x[:1], torch.tensor([3]))
    with pytest.raises(IndexError, match="unknown task id 7: this network has 3 tasks"):
        layer.remove_tasks([0, 7])
    with pytest.raises(ValueError, match="would leave none of 3"):
        layer.remove_tasks([0, 1, 2])
    assert layer.num_tasks == 3


def test_growing_drops_held_noise_and_keeps_frozen_parameters_frozen(name: str) -> None:
    layer = made(name)
    hold_noise(layer)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    layer.add_tasks(1)
    assert layer.noise is None
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer(torch.randn(4, 2, 5, dtype=torch.float64), torch.arange(4))
    hold_noise(layer)
    layer.remove_tasks([0])
    assert layer.noise is None
    assert not any(parameter.requires_grad for parameter in layer.parameters())
