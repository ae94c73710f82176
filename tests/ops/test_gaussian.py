from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from varshare_rl.ops.gaussian import gaussian_kl, normal_log_prob, posterior_kl, softplus_sigma


def test_sigma_by_hand() -> None:
    rho = torch.tensor([0.0, -5.0, 3.0], dtype=torch.float64)
    expected = [math.log(2.0), math.log1p(math.exp(-5.0)), math.log1p(math.exp(3.0))]
    assert softplus_sigma(rho).tolist() == pytest.approx(expected, rel=1e-12)
    assert softplus_sigma(rho, 0.25).tolist() == pytest.approx([0.25 * sigma for sigma in expected], rel=1e-12)
    assert softplus_sigma(rho, 0.0).tolist() == [0.0, 0.0, 0.0]


def test_kl_by_hand() -> None:
    one = torch.ones((), dtype=torch.float64)
    # log(1 / 0.5) + (0.25 + 1) / 2 - 1/2
    assert gaussian_kl(one, 0.5 * one, 1.0).item() == pytest.approx(math.log(2.0) + 0.125, rel=1e-12)
    # log(2 / 0.5) + (0.25 + 1) / 8 - 1/2
    assert gaussian_kl(one, 0.5 * one, 2.0).item() == pytest.approx(math.log(4.0) - 0.34375, rel=1e-12)


@pytest.mark.parametrize("prior_scale", [0.1, 1.0, 3.0])
def test_kl_equals_torch_distributions(prior_scale: float) -> None:
    mu = torch.randn(4, 5, dtype=torch.float64)
    sigma = torch.rand(4, 5, dtype=torch.float64) + 0.01
    prior = Normal(torch.zeros((), dtype=torch.float64), prior_scale)
    torch.testing.assert_close(gaussian_kl(mu, sigma, prior_scale), kl_divergence(Normal(mu, sigma), prior))


def test_kl_is_never_negative_and_zero_only_at_the_prior() -> None:
    mu = torch.randn(10_000, dtype=torch.float64)
    sigma = torch.rand(10_000, dtype=torch.float64) * 3 + 1e-3
    assert (gaussian_kl(mu, sigma, 0.7) > 0).all()
    at_prior = gaussian_kl(torch.zeros(3, dtype=torch.float64), torch.full((3,), 0.7, dtype=torch.float64), 0.7)
    torch.testing.assert_close(at_prior, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)


def test_kl_equals_monte_carlo() -> None:
    mu, sigma, prior_scale = torch.tensor(0.3).double(), torch.tensor(0.2).double(), 0.9
    draws = mu + sigma * torch.randn(400_000, dtype=torch.float64)
    samples = Normal(mu, sigma).log_prob(draws) - Normal(torch.zeros_like(mu), prior_scale).log_prob(draws)
    error = float(samples.std()) / math.sqrt(len(samples))
    assert error < 0.005
    assert float(gaussian_kl(mu, sigma, prior_scale)) == pytest.approx(float(samples.mean()), abs=4 * error)


def test_log_prob_equals_torch_distributions() -> None:
    value, mean, log_std = torch.randn(3, 50, dtype=torch.float64)
    torch.testing.assert_close(normal_log_prob(value, mean, log_std), Normal(mean, log_std.exp()).log_prob(value))


def test_posterior_kl_is_the_sum_with_gradients_written_out() -> None:
    mu = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    rho = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    elementwise = gaussian_kl(mu, softplus_sigma(rho), 0.7).flatten(1).sum(1)
    torch.testing.assert_close(posterior_kl(mu, rho, 0.7), elementwise)
    assert torch.autograd.gradcheck(lambda m, r: posterior_kl(m, r, 0.7), (mu, rho))
