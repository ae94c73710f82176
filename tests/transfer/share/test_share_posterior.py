"""Posteriors over coefficients: the divergence, the prior from earlier tasks, and the limit of no spread."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from share_reference import adapters
from torch import Tensor, nn

from varshare_rl.nn.layer import penalized_layers
from varshare_rl.nn.stochastic import RowNoise, WeightNoise, drawn_layers, posterior_mean
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.ops.gaussian import gaussian_kl_between, posterior_kl
from varshare_rl.transfer.share import (
    Coefficients,
    LearnConfig,
    ShareConfig,
    ShareLinear,
    SizeConfig,
    attach,
    consolidate,
    merge,
    put_coefficients,
    take_coefficients,
)
from varshare_rl.transfer.share.coefficients import GaussianCoefficients, PointCoefficients
from varshare_rl.transfer.share.posterior import Gaussian, align, plain_prior, prior_from_tasks

K_B, K_A, P = 4, 5, 2


def some(seed: int, p: int = P, std: bool = True) -> Coefficients:
    generator = torch.Generator().manual_seed(seed)
    eps = [torch.randn(k, p, generator=generator) for k in (K_B, K_A)]
    sigma = [0.1 + torch.rand(k, p, generator=generator) for k in (K_B, K_A)]
    return Coefficients(*eps, *(sigma if std else (None, None)))


def test_divergence_by_hand() -> None:
    # N(1, 2^2) from N(3, 4^2): log 2 + (4 + 4) / 32 - 1/2
    found = gaussian_kl_between(*(torch.tensor(value, dtype=torch.float64) for value in (1.0, 2.0, 3.0, 4.0)))
    assert float(found) == pytest.approx(math.log(2) + 0.25 - 0.5, abs=1e-12)
    mu, sigma = torch.randn(1, 5), torch.rand(1, 5) + 0.1
    entries = gaussian_kl_between(mu, sigma, torch.zeros(5), torch.full((5,), 0.7))
    together = posterior_kl([(mu, sigma.expm1().log())], [torch.tensor([0.7]).log()])
    torch.testing.assert_close(entries.sum(1), together)


def test_divergence_of_a_layer_against_torch_and_monte_carlo() -> None:
    prior = prior_from_tasks([some(1), some(2)], P, 1.0, 1.0)
    own = GaussianCoefficients(3, prior).double()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    found = own.kl()
    total, estimate = torch.zeros(3).double(), torch.zeros(3).double()
    for mu, rho, mean, std in (
        (own.mus_B, own.rhos_B, own.prior_mean_B, own.prior_std_B),
        (own.mus_A, own.rhos_A, own.prior_mean_A, own.prior_std_A),
    ):
        q = torch.distributions.Normal(mu, F.softplus(rho))
        p = torch.distributions.Normal(mean.expand_as(mu), std.expand_as(mu))
        total = total + torch.distributions.kl_divergence(q, p).sum((1, 2))
        draws = q.sample((20_000,))
        estimate += (q.log_prob(draws) - p.log_prob(draws)).mean(0).sum((1, 2))
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(found.detach(), estimate, rtol=0.03, atol=0.0)
    expected = torch.autograd.grad(total.sum(), list(own.parameters()))
    for ours, theirs in zip(torch.autograd.grad(found.sum(), list(own.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_divergence_is_zero_at_the_prior_and_only_there() -> None:
    prior = prior_from_tasks([some(1), some(2)], P, 1.0, 1.0)
    own = GaussianCoefficients(2, prior)
    own.put(0, Coefficients(prior.mean_B, prior.mean_A, prior.std_B, prior.std_A))
    nats = own.kl().detach()
    assert float(nats[0]) == pytest.approx(0.0, abs=1e-5)
    assert float(nats[1]) > 1.0


def test_prior_of_one_task_alone_is_its_posterior() -> None:
    task = some(1)
    prior = prior_from_tasks([task], P, 1.0, 0.0)
    for found, expected in (
        (prior.mean_B, task.eps_B),
        (prior.std_B, task.std_B),
        (prior.mean_A, task.eps_A),
        (prior.std_A, task.std_A),
    ):
        assert expected is not None
        torch.testing.assert_close(found, expected)


def test_prior_by_hand() -> None:
    """Tasks with one coefficient on either side, N(1, 0.5^2) and N(3, 1), and one imagined task N(0, 2^2)."""
    tasks = [
        Coefficients(*(torch.tensor([[mu]]) for mu in (mean, mean)), *(torch.tensor([[std]]) for _ in range(2)))
        for mean, std in ((1.0, 0.5), (3.0, 1.0))
    ]
    prior = prior_from_tasks(tasks, 1, 2.0, 1.0)
    mean = 4.0 / 3.0
    variance = (0.25 + (1 - mean) ** 2 + 1.0 + (3 - mean) ** 2 + 4.0 + mean**2) / 3.0
    assert float(prior.mean_B) == pytest.approx(mean, rel=1e-6)
    assert float(prior.std_A) == pytest.approx(math.sqrt(variance), rel=1e-6)


def test_prior_minimises_the_divergences_of_the_earlier_tasks() -> None:
    tasks, weight, scale = [some(1), some(2, std=False), some(3)], 0.7, 1.3
    prior = prior_from_tasks(tasks, P, scale, weight)
    mus_B, var_B, _, _ = align(tasks, P)
    var_B = var_B + 1e-9  # a point has a divergence of infinity whatever the prior

    def objective(mean: Tensor, std: Tensor) -> float:
        own = gaussian_kl_between(mus_B, var_B.sqrt(), mean, std).sum()
        plain = gaussian_kl_between(torch.zeros(()).double(), torch.tensor(scale).double(), mean, std).sum()
        return float(own + weight * plain)

    best = objective(prior.mean_B.double(), prior.std_B.double())
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        change = [0.05 * torch.randn(K_B, P, generator=generator, dtype=torch.float64) for _ in range(2)]
        other = objective(prior.mean_B.double() + change[0], prior.std_B.double() * change[1].exp())
        assert other > best


def test_alignment_undoes_any_turn_and_changes_no_correction() -> None:
    """``(eps_B Q, eps_A Q)`` is the same task: a prior that saw another mean would be about nothing."""
    task = some(4, std=False)
    turns = [torch.linalg.qr(torch.randn(P, P))[0] for _ in range(4)]
    turned = [Coefficients(task.eps_B @ turn, task.eps_A @ turn) for turn in turns]
    mus_B, _, mus_A, _ = align(turned, P)
    for own_B, own_A in zip(mus_B, mus_A, strict=True):
        torch.testing.assert_close(own_B, mus_B[0], atol=1e-5, rtol=0)
        torch.testing.assert_close((own_B @ own_A.t()).float(), task.eps_B @ task.eps_A.t())
    prior = prior_from_tasks(turned, P, 1.0, 1e-9)
    assert float(prior.std_B.max()) < 1e-3  # all agree
    naive = torch.stack([own.eps_B for own in turned]).std(0)
    assert float(naive.max()) > 0.1


def test_alignment_turns_variances_as_draws_turn() -> None:
    tasks = [some(5), some(6)]
    _, var_B, _, _ = align(tasks, P)
    mus_B, _, _, _ = align(tasks, P)
    turn = torch.linalg.lstsq(tasks[1].eps_B.double(), mus_B[1]).solution
    assert tasks[1].std_B is not None
    draws = tasks[1].eps_B + tasks[1].std_B * torch.randn(50_000, K_B, P)
    torch.testing.assert_close((draws.double() @ turn).var(0), var_B[1], rtol=0.05, atol=0.01)


def test_lower_ranks_are_aligned_too() -> None:
    prior = prior_from_tasks([some(1, p=1), some(2, p=3)], 3, 1.0, 1.0)
    assert prior.mean_B.shape == (K_B, 3)
    assert all(bool(part.isfinite().all()) for part in (prior.mean_B, prior.std_B, prior.mean_A, prior.std_A))


def layers(sigma: float) -> tuple[ShareLinear, ShareLinear]:
    """The same mean coefficients, as points and with a posterior of this spread."""
    torch.manual_seed(0)
    theta, bias = torch.randn(6, 7), torch.randn(6)
    bases = torch.linalg.qr(torch.randn(6, K_B))[0], torch.linalg.qr(torch.randn(7, K_A))[0]
    points = ShareLinear(theta, bias, *bases, PointCoefficients(3, K_B, K_A, P))
    gaussian = ShareLinear(theta, bias, *bases, GaussianCoefficients(3, plain_prior(K_B, K_A, P, 1.0)))
    for task in range(3):
        own = some(task)
        points.coefficients.put(task, own)
        stds = (torch.full_like(own.eps_B, sigma), torch.full_like(own.eps_A, sigma))
        gaussian.coefficients.put(task, Coefficients(own.eps_B, own.eps_A, *stds))
    return points, gaussian


def test_no_spread_is_the_deterministic_layer() -> None:
    points, gaussian = layers(0.0)
    x, ids = torch.randn(3, 5, 7), torch.arange(3)
    torch.testing.assert_close(gaussian(x, ids), points(x, ids), atol=1e-5, rtol=1e-5)
    points, gaussian = layers(0.5)
    assert float((gaussian(x, ids) - points(x, ids)).detach().abs().max()) > 0.1
    torch.testing.assert_close(gaussian(x, ids, temperature=0.0), points(x, ids))
    with posterior_mean(gaussian):
        torch.testing.assert_close(gaussian(x, ids), points(x, ids))
    direction = torch.randn(3, 5, 6)
    (points(x, ids) * direction).sum().backward()
    (gaussian(x, ids, temperature=0.0) * direction).sum().backward()
    for name in ("B", "A"):
        torch.testing.assert_close(
            gaussian.get_parameter(f"coefficients.mus_{name}").grad,
            points.get_parameter(f"coefficients.eps_{name}").grad,
        )


def test_mean_and_spread_of_the_output() -> None:
    """By Monte Carlo: the mean weight is exact, the variance of one output follows from independent factors."""
    _, gaussian = layers(0.3)
    x = torch.randn(1, 7)
    with torch.no_grad():
        draws = torch.cat([gaussian(x, 1) for _ in range(6_000)])
        with posterior_mean(gaussian):
            mean = gaussian(x, 1)[0]
    own, z = gaussian.coefficients.take(1), (x @ gaussian.basis_A)[0]
    inside = own.eps_A.t() @ z  # [p], with variance 0.09 |z|^2
    noise = 0.09 * z.square().sum()
    # var of sum_c eps_B[j, c] h_c, the two independent: E[b]^2 var(h) + var(b) E[h^2]
    core_variance = (own.eps_B.square() * noise + 0.09 * (inside.square() + noise)).sum(1)
    shared = own.eps_B @ own.eps_B.t() * noise  # rows of the core share h
    covariance = shared - torch.diag(shared.diag()) + torch.diag(core_variance)
    expected = gaussian.basis_B @ covariance @ gaussian.basis_B.t()
    torch.testing.assert_close(draws.mean(0), mean, atol=0.09, rtol=0)
    torch.testing.assert_close(draws.var(0), expected.diag(), rtol=0.12, atol=0.01)


def test_held_noise_gives_the_same_draw_again() -> None:
    _, gaussian = layers(0.5)
    assert gaussian.coefficients.penalized
    assert not layers(0.5)[0].coefficients.penalized
    assert [name for name, _ in penalized_layers(nn.ModuleDict({"layer": gaussian}))] == ["layer.coefficients"]
    x = torch.randn(4, 7)
    gaussian.coefficients.noise = WeightNoise(gaussian.coefficients.draw_noise(3))
    torch.testing.assert_close(gaussian(x, 2), gaussian(x, 2), rtol=0, atol=0)
    gaussian.coefficients.add_tasks(1)
    assert gaussian.coefficients.noise is None  # of fewer tasks


def test_held_draws_by_row_of_a_batch_are_each_rows_own_weight() -> None:
    """Two draws for each of three tasks, dealt to the rows: against a weight built for every row."""
    _, gaussian = layers(0.5)
    own, tasks = gaussian.coefficients, torch.tensor([0, 0, 1, 1, 2, 2])
    assert isinstance(own, GaussianCoefficients)
    values = own.draw_noise(6)
    index = torch.tensor([[0, 1, 1, 0], [3, 2, 3, 3], [4, 5, 5, 4]])
    own.noise = WeightNoise(values, index, tasks)
    x = torch.randn(3, 4, 7)
    y = gaussian(x, torch.arange(3))
    for task in range(3):
        for row in range(4):
            draw = int(index[task, row])
            eps_B = own.mus_B[task] + F.softplus(own.rhos_B[task]) * values[0][draw]
            eps_A = own.mus_A[task] + F.softplus(own.rhos_A[task]) * values[1][draw]
            weight = gaussian.theta + gaussian.basis_B @ eps_B @ (gaussian.basis_A @ eps_A).t()
            torch.testing.assert_close(y[task, row], F.linear(x[task, row], weight, gaussian.bias))
    with posterior_mean(gaussian):
        means = gaussian(x, torch.arange(3))
    own.noise = WeightNoise(tuple(torch.zeros_like(value) for value in values), index, tasks)
    torch.testing.assert_close(gaussian(x, torch.arange(3)), means)


@torch.no_grad()
def test_a_draw_for_every_row_is_distributed_as_a_draw_of_the_weight() -> None:
    _, gaussian = layers(0.3)
    own = gaussian.coefficients
    assert isinstance(own, GaussianCoefficients)
    rows = 20_000
    x, ids = torch.randn(3, 1, 7), torch.arange(3)
    own.noise = RowNoise(tuple(torch.randn(3, rows, size) for size in own.row_noise_sizes()))
    by_row = gaussian(x.expand(3, rows, 7), ids)
    values = own.draw_noise(3 * rows)
    index = torch.arange(3 * rows).view(3, rows)
    own.noise = WeightNoise(values, index, torch.arange(3).repeat_interleave(rows))
    by_weight = gaussian(x.expand(3, rows, 7), ids)
    torch.testing.assert_close(by_row.mean(1), by_weight.mean(1), atol=0.08, rtol=0)
    for task in range(3):
        torch.testing.assert_close(by_row[task].T.cov(), by_weight[task].T.cov(), rtol=0.1, atol=0.15)
    own.theta_only = True
    torch.testing.assert_close(gaussian(x, ids), F.linear(x, gaussian.theta, gaussian.bias))


def test_coefficients_draw_but_have_no_scale_to_be_moved() -> None:
    points, gaussian = (nn.ModuleDict({"layer": layer}) for layer in layers(0.5))
    assert [name for name, _ in drawn_layers(gaussian)] == ["layer.coefficients"]
    assert not list(stochastic_layers(gaussian))
    assert not list(drawn_layers(points))


def test_a_fresh_task_starts_in_the_priors_gauge() -> None:
    prior = Gaussian(torch.zeros(K_B, P), torch.ones(K_B, P), torch.randn(K_A, P), torch.full((K_A, P), 1e-4))
    own = GaussianCoefficients(1, prior)
    torch.testing.assert_close(own.mus_A[0].detach(), prior.mean_A, atol=1e-3, rtol=0)
    assert float(own.mus_B.detach().abs().max()) == 0.0
    wide = GaussianCoefficients(1, plain_prior(50, 400, 50, 10.0))
    assert float(wide.mus_A.detach().std()) == pytest.approx(1 / 20, rel=0.05)


def test_prior_follows_from_earlier_tasks_through_merges() -> None:
    """Learn a task with a posterior, store it, merge another: the next task's prior is that of the stored ones."""
    share = consolidate(adapters(3, 2), ShareConfig(k=SizeConfig(fixed=6)))
    model = nn.ModuleDict({"layer0": nn.Linear(40, 30)})
    layer = attach(model, share, LearnConfig(variational=True), fresh=1)["layer0"]
    assert isinstance(layer.coefficients, GaussianCoefficients)
    expected = prior_from_tasks(share.layers["layer0"].coefficients, 2, 1.0, 1.0)  # type: ignore[arg-type,union-attr]
    torch.testing.assert_close(layer.coefficients.prior_mean_B, expected.mean_B)
    with torch.no_grad():
        layer.coefficients.mus_B.normal_()
        layer.coefficients.rhos_B.fill_(0.5)
    share = put_coefficients(share, "learnt", take_coefficients(model, 0))
    share = merge(share, {"other": adapters(1, 2, seed=3)["task0"]})
    held = share.layers["layer0"].coefficients  # type: ignore[union-attr]
    assert [own.std_B is not None for own in held] == [False, False, False, True, False]  # type: ignore[union-attr]
    again = nn.ModuleDict({"layer0": nn.Linear(40, 30)})
    options = LearnConfig(variational=True, prior_scale=0.5, prior_tasks=2.0)
    second = attach(again, share, options, fresh=1)["layer0"].coefficients
    assert isinstance(second, GaussianCoefficients)
    torch.testing.assert_close(second.prior_std_B, prior_from_tasks(held, 2, 0.5, 2.0).std_B)  # type: ignore[arg-type]
    assert float(second.prior_std_B.max()) > float(expected.std_B.max()) * 0.5
