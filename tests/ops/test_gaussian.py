from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from varshare_rl.ops.gaussian import (
    normal_log_prob,
    posterior_kl,
    random_signs,
    softplus_sigma,
)


def rho_of(sigma: float) -> float:
    return math.log(math.expm1(sigma))


def kl(mu: float, sigma: float, prior_scale: float) -> float:
    """The divergence of a single weight."""
    given = [torch.full((1, 1), value, dtype=torch.float64) for value in (mu, rho_of(sigma))]
    return posterior_kl([(given[0], given[1])], [torch.tensor([prior_scale], dtype=torch.float64).log()]).item()


def test_sigma_by_hand() -> None:
    rho = torch.tensor([0.0, -5.0, 3.0], dtype=torch.float64)
    expected = [math.log(2.0), math.log1p(math.exp(-5.0)), math.log1p(math.exp(3.0))]
    assert softplus_sigma(rho).tolist() == pytest.approx(expected, rel=1e-12)
    assert softplus_sigma(rho, 0.25).tolist() == pytest.approx([0.25 * sigma for sigma in expected], rel=1e-12)
    assert softplus_sigma(rho, 0.0).tolist() == [0.0, 0.0, 0.0]


def test_kl_by_hand() -> None:
    assert kl(1.0, 0.5, 1.0) == pytest.approx(math.log(2.0) + 0.125, rel=1e-12)  # log(1 / .5) + (.25 + 1) / 2 - 1/2
    assert kl(1.0, 0.5, 2.0) == pytest.approx(math.log(4.0) - 0.34375, rel=1e-12)  # log(2 / .5) + 1.25 / 8 - 1/2
    assert kl(0.0, 0.7, 0.7) == pytest.approx(0.0, abs=1e-15)


def test_kl_equals_torch_distributions_task_by_task() -> None:
    mu = torch.randn(3, 4, 5, dtype=torch.float64)
    rho = torch.randn(3, 4, 5, dtype=torch.float64)
    scale = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    prior = Normal(torch.zeros((), dtype=torch.float64), scale.view(3, 1, 1))
    expected = kl_divergence(Normal(mu, softplus_sigma(rho)), prior).sum((1, 2))
    torch.testing.assert_close(posterior_kl([(mu, rho)], [scale.log()]), expected)
    assert (expected > 0).all()
    other = (torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64))
    alone = posterior_kl([other], [-scale.log()])
    together = posterior_kl([(mu, rho), other], [scale.log(), -scale.log()])
    torch.testing.assert_close(together, expected + alone)


def test_kl_equals_monte_carlo() -> None:
    mu, sigma, prior_scale = torch.tensor(0.3).double(), torch.tensor(0.2).double(), 0.9
    draws = mu + sigma * torch.randn(400_000, dtype=torch.float64)
    samples = Normal(mu, sigma).log_prob(draws) - Normal(torch.zeros_like(mu), prior_scale).log_prob(draws)
    error = float(samples.std()) / math.sqrt(len(samples))
    assert error < 0.005
    assert kl(0.3, 0.2, prior_scale) == pytest.approx(float(samples.mean()), abs=4 * error)


def test_gradients_of_the_kl_are_written_out_right() -> None:
    shapes = ((3, 4, 5), (3, 4, 5), (3, 2), (3, 2), (3,), (3,))
    inputs = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def of_two(*given: torch.Tensor) -> torch.Tensor:
        mu, rho, other_mu, other_rho, scale, other_scale = given
        return posterior_kl([(mu, rho), (other_mu, other_rho)], [scale, other_scale])

    assert torch.autograd.gradcheck(of_two, inputs)


def test_log_prob_equals_torch_distributions() -> None:
    value, mean, log_std = torch.randn(3, 50, dtype=torch.float64)
    torch.testing.assert_close(normal_log_prob(value, mean, log_std), Normal(mean, log_std.exp()).log_prob(value))


def test_signs_are_even() -> None:
    signs = random_signs(torch.empty(1000, 5, 33))
    assert signs.shape == (1000, 5, 33)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    flat = signs.view(1000, -1)
    assert flat.mean(0).abs().max() < 5 / math.sqrt(1000)  # every place is even ...
    correlation = flat.T @ flat / 1000
    assert (correlation - torch.eye(165)).abs().max() < 6 / math.sqrt(1000)  # ... and none depends on another
    assert random_signs(torch.empty(3, dtype=torch.float64)).dtype == torch.float64
