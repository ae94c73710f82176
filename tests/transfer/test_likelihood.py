"""Divergences against torch.distributions, and Fisher information by Monte Carlo against the closed form."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

from varshare_rl.nn.actor import CategoricalActor, GaussianActor, GaussianConfig, LogStd
from varshare_rl.nn.critic import CriticConfig, CriticHead, TaskAffine, ValueLoss
from varshare_rl.transfer.likelihood import (
    CategoricalOutputs,
    GaussianPolicy,
    UnitGaussian,
    policy_likelihood,
    value_likelihood,
)

MASK = torch.tensor([[[1.0, 1.0, 0.0]]])
GAUSSIAN = GaussianPolicy(
    GaussianActor(torch.nn.Identity(), MASK[0].bool(), GaussianConfig(initial=0.3, least=-5.0, most=1.0))
)
CATEGORICAL = CategoricalOutputs(torch.tensor([[[True, True, False, True]]]))


def test_divergence_of_gaussian_policies() -> None:
    old, new = torch.randn(2, 1, 5, 6)
    mine = GAUSSIAN.divergence(old, new)
    normals = []
    for outputs in (old, new):
        mean, log_std = outputs.chunk(2, -1)
        normals.append(Normal(mean, (log_std + 0.3).clamp(-5.0, 1.0).exp()))
    torch.testing.assert_close(mine, (kl_divergence(*normals) * MASK).sum(-1))
    assert mine.shape == (1, 5)
    torch.testing.assert_close(GAUSSIAN.divergence(old, old), torch.zeros(1, 5))


def test_divergence_of_categorical_policies() -> None:
    old, new = torch.randn(2, 1, 5, 4)
    kept = torch.tensor([0, 1, 3])
    expected = kl_divergence(*(Categorical(logits=outputs[..., kept]) for outputs in (old, new)))
    torch.testing.assert_close(CATEGORICAL.divergence(old, new), expected)


def test_divergence_of_values() -> None:
    old, new = torch.randn(2, 1, 5, 1)
    expected = kl_divergence(Normal(old, 1.0), Normal(new, 1.0)).sum(-1)
    torch.testing.assert_close(UnitGaussian().divergence(old, new), expected)


def test_sampled_scores_have_the_fisher_information() -> None:
    """``E[(d log p / d mean)^2] = 1 / std^2``, ``E[(d log p / d log std)^2] = 2``, and ``p (1 - p)`` for logits."""
    outputs = torch.tensor([0.2, -0.4, 0.9, -0.5, 0.1, 0.3]).expand(1, 200_000, 6).clone().requires_grad_(True)
    (score,) = torch.autograd.grad(GAUSSIAN.sampled_log_prob(outputs).sum(), outputs)
    precision = (-2 * (outputs[0, 0, 3:5].detach() + 0.3)).exp()
    found = score.square().mean((0, 1))
    torch.testing.assert_close(found[:2], precision, rtol=0.03, atol=0)
    torch.testing.assert_close(found[3:5], torch.full((2,), 2.0), rtol=0.03, atol=0)
    assert found[2] == found[5] == 0  # the task does not have this dimension
    logits = torch.tensor([0.2, -0.4, 5.0, 0.5]).expand(1, 200_000, 4).clone().requires_grad_(True)
    (score,) = torch.autograd.grad(CATEGORICAL.sampled_log_prob(logits).sum(), logits)
    p = torch.softmax(torch.tensor([0.2, -0.4, -torch.inf, 0.5]), 0)
    torch.testing.assert_close(score.square().mean((0, 1)), p * (1 - p), rtol=0.03, atol=1e-7)
    values = torch.zeros(1, 200_000, 1, requires_grad=True)
    (score,) = torch.autograd.grad(UnitGaussian().sampled_log_prob(values).sum(), values)
    assert float(score.square().mean()) == pytest.approx(1.0, rel=0.03)


def test_actors_say_what_their_networks_mean() -> None:
    network = torch.nn.Identity()
    mask = torch.tensor([[True, False]])
    config = GaussianConfig(log_std=LogStd.parameter, initial=-0.5)
    gaussian = policy_likelihood(GaussianActor(network, mask, config))
    assert isinstance(gaussian, GaussianPolicy)
    assert gaussian.mask.flatten().tolist() == [1.0, 0.0]
    old, new = torch.randn(2, 1, 5, 2)  # means alone: the standard deviation is the actor's
    expected = 0.5 * ((old - new)[..., 0] / torch.tensor(-0.5).exp()).square()
    torch.testing.assert_close(gaussian.divergence(old, new), expected)
    categorical = policy_likelihood(CategoricalActor(network, torch.tensor([[True, False]])))
    assert isinstance(categorical, CategoricalOutputs)
    assert categorical.mask.flatten().tolist() == [True, False]


def test_a_policy_of_the_past_is_measured_by_its_own_log_standard_deviation() -> None:
    config = GaussianConfig(log_std=LogStd.parameter, initial=-0.5)
    likelihood = GaussianPolicy(GaussianActor(torch.nn.Identity(), MASK[0].bool(), config))
    old, new = torch.randn(2, 1, 5, 3)
    kept = likelihood.complete(old)
    assert torch.equal(likelihood.complete(kept), kept)
    likelihood.actor.get_parameter("log_stds").data.fill_(0.7)  # of the next task
    deviation = torch.tensor(-0.5).exp()
    expected = (kl_divergence(Normal(old, deviation), Normal(new, deviation)) * MASK).sum(-1)
    torch.testing.assert_close(likelihood.divergence(kept, new), expected)
    assert GAUSSIAN.complete(old) is old


def test_critics_say_what_their_networks_mean() -> None:
    plain = value_likelihood(CriticHead(1, CriticConfig()))
    assert isinstance(plain, UnitGaussian)
    assert plain.affine is None
    categorical = value_likelihood(CriticHead(1, CriticConfig(loss=ValueLoss.categorical, bins=5)))
    assert isinstance(categorical, CategoricalOutputs)
    old, new = torch.randn(2, 1, 7, 5)
    expected = kl_divergence(Categorical(logits=old), Categorical(logits=new))
    torch.testing.assert_close(categorical.divergence(old, new), expected)


def test_values_are_measured_in_the_units_of_their_task() -> None:
    head = CriticHead(1, CriticConfig(popart=True))
    likelihood = value_likelihood(head)
    assert isinstance(likelihood, UnitGaussian)
    assert isinstance(head.affine, TaskAffine)
    head.affine.scale.data.fill_(3.0)
    head.affine.offset.data.fill_(-2.0)
    old, new = torch.randn(2, 1, 5, 1)
    expected = kl_divergence(Normal(3.0 * old - 2.0, 1.0), Normal(3.0 * new - 2.0, 1.0)).sum(-1)
    torch.testing.assert_close(likelihood.divergence(old, new), expected)
    kept = likelihood.complete(old)
    assert torch.equal(likelihood.complete(kept), kept)
    outputs = torch.zeros(1, 200_000, 1, requires_grad=True)
    (score,) = torch.autograd.grad(likelihood.sampled_log_prob(outputs).sum(), outputs)
    assert float(score.square().mean()) == pytest.approx(9.0, rel=0.03)
    head.affine.scale.data.fill_(0.1)  # of the next task
    torch.testing.assert_close(likelihood.divergence(kept, new), expected)
