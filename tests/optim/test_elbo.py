from __future__ import annotations

import pytest
import torch

from varshare_rl.nn import IndependentConfig, Posterior, SharedConfig, VarShareConfig, VarShareLoRAConfig
from varshare_rl.nn.config import PosteriorStart, PriorUnits
from varshare_rl.nn.parameters import total_kl
from varshare_rl.optim.elbo import Elbo, ElboConfig, Estimator, KLNormalization, posterior_size

TASKS = 3


def network() -> torch.nn.Module:
    made = VarShareLoRAConfig(hidden=[6], rank=2).build(4, 2, TASKS, Posterior())
    with torch.no_grad():
        made.layers[0].mus_B[1] += 1.0
    return made


@pytest.mark.parametrize(
    ("normalization", "divisor"),
    [
        (KLNormalization.data, 500.0),
        (KLNormalization.seen, 2000.0),
        (KLNormalization.budget, 10_000.0),
        (KLNormalization.parameters, 2 * (4 + 6) + 2 * (6 + 2)),  # Gaussians of one task
        (KLNormalization.none, 1.0),
    ],
)
def test_penalty_is_the_weighted_kl_over_n(normalization: KLNormalization, divisor: float) -> None:
    made = network()
    elbo = Elbo(ElboConfig(kl_weight=0.2, normalization=normalization), TASKS, budget_per_task=10_000)
    penalty = elbo.penalty(made, 500, 2000)
    assert isinstance(penalty, torch.Tensor)
    assert penalty.shape == (TASKS,)
    torch.testing.assert_close(penalty, 0.2 * total_kl(made, TASKS) / divisor)
    assert penalty[1] > penalty[0]


def test_gradient_of_the_penalty_stays_with_its_task() -> None:
    made = network()
    penalty = Elbo(ElboConfig(), TASKS).penalty(made, 10)
    assert isinstance(penalty, torch.Tensor)
    penalty[2].backward()
    for layer in made.layers:
        for name in layer.per_task_parameters:
            assert (layer.get_parameter(name).grad.flatten(1).abs().sum(1) > 0)[:2].tolist() == [False, False]
    assert (made.layers[0].rhos_A.grad[2] != 0).all()


def test_no_weight_no_penalty() -> None:
    assert Elbo(ElboConfig(kl_weight=0.0), TASKS).penalty(network(), 10) == 0.0


@pytest.mark.parametrize("options", [SharedConfig(hidden=[5]), IndependentConfig(hidden=[5])])
@pytest.mark.parametrize("normalization", list(KLNormalization))
def test_networks_without_posteriors_have_no_penalty(
    options: SharedConfig | IndependentConfig, normalization: KLNormalization
) -> None:
    made = options.build(4, 2, TASKS, Posterior())
    penalty = Elbo(ElboConfig(normalization=normalization), TASKS).penalty(made, 10)
    assert penalty == 0.0


def test_the_penalty_alone_brings_the_posterior_to_the_prior() -> None:
    made = VarShareConfig(hidden=[3]).build(2, 1, TASKS, Posterior(prior_scale=0.5))
    elbo = Elbo(ElboConfig(kl_weight=1.0, normalization=KLNormalization.none), TASKS)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.2)
    start = total_kl(made, TASKS)
    for _ in range(150):
        optimizer.zero_grad()
        penalty = elbo.penalty(made, 1)
        assert isinstance(penalty, torch.Tensor)
        penalty.sum().backward()
        optimizer.step()
    assert start.min() > 30
    assert total_kl(made, TASKS).max() < 0.01


def test_posterior_size_counts_gaussians_of_one_task() -> None:
    assert posterior_size(VarShareConfig(hidden=[6]).build(4, 2, TASKS, Posterior())) == 4 * 6 + 6 * 2
    assert posterior_size(SharedConfig(hidden=[6]).build(4, 2, TASKS, Posterior())) == 0


def test_options_become_posterior_settings() -> None:
    options = ElboConfig(prior_scale=0.3, temperature=0.5, estimator=Estimator.flipout, weight_samples=3)
    assert options.posterior() == Posterior(
        0.3, PriorUnits.theta, PosteriorStart.prior, estimator="flipout", temperature=0.5, weight_samples=3
    )


@pytest.mark.parametrize(("width", "rank", "alpha"), [(8, 2, None), (64, 8, None), (64, 8, 32.0), (256, 4, 1.0)])
def test_the_prior_is_as_wide_in_units_of_theta_at_every_size(width: int, rank: int, alpha: float | None) -> None:
    """Residuals drawn from the prior, entry by entry, against the standard deviation of theta."""
    options = VarShareLoRAConfig(hidden=[], rank=rank, alpha=alpha)
    layer = options.build(width, 50, 20, Posterior(0.25, PriorUnits.theta)).layers[0]
    a, b = (torch.randn(200, *mu.shape[1:]) * layer.prior_scale[0] for mu, _ in layer.posteriors())
    measured = float((layer.scale * (b @ a)).std())
    assert measured == pytest.approx(0.25 * float(layer.theta.detach().std()), rel=0.05)


def test_full_rank_priors_have_the_same_units() -> None:
    layer = VarShareConfig(hidden=[]).build(64, 50, 2, Posterior(0.25, PriorUnits.theta)).layers[0]
    assert float(layer.prior_scale[0]) == pytest.approx(0.25 * float(layer.theta.detach().std()), rel=0.05)


@pytest.mark.parametrize("options", [VarShareConfig(hidden=[8]), VarShareLoRAConfig(hidden=[8])])
def test_a_posterior_that_starts_at_its_prior_costs_next_to_nothing(options: VarShareConfig) -> None:
    narrow, wide = (
        total_kl(options.build(16, 4, TASKS, Posterior(0.1, PriorUnits.theta, start)), TASKS)
        for start in PosteriorStart
    )
    assert narrow.min() > 50 * wide.max()
    assert wide.max() < 0.05 * posterior_size(options.build(16, 4, TASKS, Posterior()))
