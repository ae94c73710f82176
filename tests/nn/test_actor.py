"""Policies and critics: distributions, masks and shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from varshare_rl.nn import Posterior, SharedConfig, VarShareLoRAConfig
from varshare_rl.nn.actor import (
    Categorical,
    CategoricalActor,
    ClippedNormal,
    GaussianActor,
    GaussianConfig,
    GaussianFamily,
    LogStd,
    TanhNormal,
)
from varshare_rl.nn.critic import CriticConfig, TwinQ, ValueNetwork
from varshare_rl.optim.optimizer import roles

BOUNDED = GaussianConfig(initial=0.2, least=-5.0, most=1.0)


class FixedOutput(nn.Module):
    """Gives the same output rows whatever the input."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
        return self.output.expand(*x.shape[:-1], -1)


def test_gaussian_actor_splits_offsets_and_clamps() -> None:
    output = torch.tensor([0.5, -0.5, 0.3, -30.0])
    actor = GaussianActor(FixedOutput(output), torch.ones(2, 2, dtype=torch.bool), BOUNDED)
    distribution = actor(torch.zeros(2, 3, 1), torch.arange(2))
    assert distribution.mean[1, 2].tolist() == [0.5, -0.5]
    assert distribution.log_std[0, 1].tolist() == pytest.approx([0.5, -5.0])
    torch.testing.assert_close(distribution.mode(), torch.tanh(output[:2]).expand(2, 3, 2))
    high = GaussianActor(FixedOutput(torch.tensor([0.0, 9.0])), torch.ones(1, 1).bool(), BOUNDED)
    assert high(torch.zeros(1, 1, 1), torch.arange(1)).log_std.item() == 1.0


@pytest.mark.parametrize("log_std", list(LogStd))
def test_a_spread_that_has_passed_its_bound_comes_back(log_std: LogStd) -> None:
    config = GaussianConfig(log_std=log_std, most=1.0)
    outputs = GaussianActor.outputs(config, 2)
    actor = GaussianActor(
        SharedConfig(hidden=[4]).build(3, outputs, 1, Posterior()), torch.ones(1, 2).bool(), config
    )
    optimizer = torch.optim.Adam(actor.parameters(), lr=0.1)
    obs = torch.ones(1, 1, 3)
    spreads = []
    for sign in (-1.0, 1.0):  # wanted wide, then narrow
        for _ in range(100):
            optimizer.zero_grad()
            spread = actor(obs, torch.arange(1)).log_std
            (sign * spread.mean()).backward()
            optimizer.step()
        spreads.append(spread.max().item())
    assert spreads[0] == 1.0
    assert spreads[1] < 0.0


def test_gaussian_sample_agrees_with_its_log_prob() -> None:
    mean, log_std = torch.randn(2, 2, 500, 3, dtype=torch.float64)
    distribution = TanhNormal(mean, log_std, torch.ones(2, 1, 3).double())
    sample = distribution.sample()
    torch.testing.assert_close(sample.action, torch.tanh(sample.raw))
    torch.testing.assert_close(sample.log_prob, distribution.log_prob(sample.raw))
    standard = (sample.raw - mean) / log_std.exp()
    assert standard.mean().abs() < 0.1
    assert abs(float(standard.std()) - 1) < 0.1


def test_gaussian_entropy_is_an_unbiased_estimate() -> None:
    """Against the integral of -p log p over the action, with p = N(raw) / (1 - action^2)."""
    mean, std = 0.4, 0.7
    grid = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((grid - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    log_det = 2 * (math.log(2) - grid - nn.functional.softplus(-2 * grid))
    exact = torch.trapezoid(density * (log_det - density.log()), grid)
    shape = (1, 200_000, 1)
    distribution = TanhNormal(torch.full(shape, mean), torch.full(shape, math.log(std)), torch.ones(1, 1, 1))
    samples = distribution.entropy()
    assert float(samples.mean()) == pytest.approx(float(exact), abs=4 * float(samples.std()) / 200_000**0.5)


def test_gaussian_entropy_has_a_gradient_and_masked_dimensions_have_none() -> None:
    mean, log_std = torch.zeros(1, 50, 2, requires_grad=True), torch.zeros(1, 50, 2, requires_grad=True)
    TanhNormal(mean, log_std, torch.tensor([[[1.0, 0.0]]])).entropy().mean().backward()
    assert mean.grad is not None
    assert log_std.grad is not None
    assert (log_std.grad[..., 0] != 0).all()
    assert (log_std.grad[..., 1] == 0).all()
    assert (mean.grad[..., 1] == 0).all()


def test_masked_action_dimensions_are_zero() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    actor = GaussianActor(FixedOutput(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])), mask)
    distribution = actor(torch.zeros(2, 4, 1), torch.arange(2))
    for action in (distribution.sample().action, distribution.mode()):
        assert torch.equal(action != 0, mask.unsqueeze(1).expand(2, 4, 3))


def test_a_clipped_gaussian_is_that_of_the_action_before_clipping() -> None:
    """Log-probability and entropy against torch.distributions; what the environment sees is clipped and masked."""
    mean, log_std = torch.randn(2, 2, 500, 3, dtype=torch.float64)
    mask = torch.tensor([[[True, True, True]], [[True, False, True]]]).double()
    distribution, exact = ClippedNormal(mean, log_std, mask), Normal(mean, log_std.exp())
    sample = distribution.sample()
    assert (sample.raw.abs() > 1).any()
    assert torch.equal(sample.action, sample.raw.clamp(-1, 1) * mask)
    torch.testing.assert_close(sample.log_prob, (exact.log_prob(sample.raw) * mask).sum(-1))
    torch.testing.assert_close(distribution.log_prob(mean), (exact.log_prob(mean) * mask).sum(-1))
    torch.testing.assert_close(distribution.entropy(), (exact.entropy() * mask).sum(-1))
    assert torch.equal(distribution.mode(), mean.clamp(-1, 1) * mask)
    standard = (sample.raw - mean) / log_std.exp()
    assert abs(float(standard.mean())) < 0.1
    assert float(standard.std()) == pytest.approx(1.0, abs=0.1)


def test_a_log_std_that_is_a_parameter_belongs_to_the_task_and_not_to_the_observation() -> None:
    config = GaussianConfig(GaussianFamily.clipped_gaussian, LogStd.parameter, -0.5, -1.0, 0.0)
    assert GaussianActor.outputs(config, 2) == 2
    assert GaussianActor.outputs(BOUNDED, 2) == 4
    actor = GaussianActor(FixedOutput(torch.tensor([0.3, -2.0])), torch.ones(3, 2, dtype=torch.bool), config)
    assert actor.log_stds is not None
    assert actor.log_stds.tolist() == [[-0.5, -0.5]] * 3
    with torch.no_grad():
        actor.log_stds.copy_(torch.tensor([[-0.7, -0.2], [5.0, -9.0], [-0.1, -0.3]]))
    distribution = actor(torch.zeros(3, 4, 1), torch.arange(3))
    assert isinstance(distribution, ClippedNormal)
    torch.testing.assert_close(distribution.log_std[0], torch.tensor([-0.7, -0.2]).expand(4, 2))
    torch.testing.assert_close(distribution.log_std[1], torch.tensor([0.0, -1.0]).expand(4, 2))
    torch.testing.assert_close(distribution.mode(), torch.tensor([0.3, -1.0]).expand(3, 4, 2))
    one = actor.with_network(actor.network, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(one(torch.zeros(1, 4, 1), torch.tensor([2])).log_std[0, 0], actor.log_stds[2])
    distribution.log_prob(torch.zeros(3, 4, 2))[2].sum().backward()
    assert actor.log_stds.grad is not None
    assert (actor.log_stds.grad[:2] == 0).all()
    assert (actor.log_stds.grad[2] != 0).all()
    (role,) = roles(actor)
    assert (role.own, role.decays) == (True, False)


def test_categorical_draws_with_its_probabilities_and_never_outside_the_mask() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 3.0])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    distribution = CategoricalActor(FixedOutput(logits), mask)(torch.zeros(2, 40_000, 1), torch.arange(2))
    sample = distribution.sample()
    assert sample.action.dtype == torch.int64
    assert torch.equal(sample.action, sample.raw)
    assert distribution.mode()[:, 0].tolist() == [1, 3]
    for task, size in ((0, 3), (1, 4)):
        expected = torch.softmax(logits[:size], 0)
        frequency = torch.bincount(sample.action[task], minlength=4) / 40_000
        assert (frequency[:size] - expected).abs().max() < 0.01
        torch.testing.assert_close(sample.log_prob[task].exp(), expected[sample.action[task]])
    assert (sample.action[0] < 3).all()


def test_categorical_entropy_of_equal_choices() -> None:
    distribution = Categorical(torch.log_softmax(torch.zeros(1, 2, 4), -1))
    torch.testing.assert_close(distribution.entropy(), torch.full((1, 2), math.log(4.0)))


def test_value_and_twin_critics() -> None:
    options = VarShareLoRAConfig(hidden=[8])
    value = ValueNetwork(options.build(5, 1, 3, Posterior()), 3, CriticConfig())
    assert value(torch.zeros(3, 4, 5), torch.arange(3)).shape == (3, 4)
    critic = TwinQ(lambda: SharedConfig(hidden=[8]).build(7, 1, 3, Posterior()), 3, CriticConfig())
    obs, action = torch.randn(3, 4, 5), torch.randn(3, 4, 2)
    q = critic(obs, action, torch.arange(3))
    assert q.shape == (2, 3, 4)
    assert (q[0] != q[1]).all()  # two networks with their own starts
    assert not torch.equal(critic(obs, -action, torch.arange(3)), q)
    assert not torch.equal(critic(-obs, action, torch.arange(3)), q)
