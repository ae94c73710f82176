from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from varshare_rl.ops.rl import (
    clipped_squared_error,
    finite_mean,
    normalize_over_tasks,
    normalize_per_task,
    ppo_policy_loss,
    squared_error,
)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.0),  # inside the range: the plain surrogate
        (1.5, 2.0, -2.4, 0.0),  # better and already far: clipped, no gradient
        (0.5, 2.0, -1.0, -2.0),  # the clipped term is larger: the plain one is the bound
        (0.5, -2.0, 1.6, 0.0),  # worse and already far: clipped
        (1.5, -2.0, 3.0, 2.0),  # moved the wrong way: not clipped
    ],
)
def test_ppo_loss_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    old = torch.tensor([[0.3]], dtype=torch.float64)
    log_prob = (old + math.log(ratio)).requires_grad_()
    got = ppo_policy_loss(log_prob, old, torch.tensor([[advantage]], dtype=torch.float64), clip=0.2)
    assert got.loss.shape == (1,)
    assert got.loss.item() == pytest.approx(loss, rel=1e-12)
    got.loss.sum().backward()
    assert log_prob.grad is not None
    assert log_prob.grad.item() == pytest.approx(slope * ratio, rel=1e-12)  # d ratio / d log_prob = ratio
    assert got.clip_fraction.item() == float(abs(ratio - 1) > 0.2)
    assert got.approximate_kl.item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-15)


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (1.1, 0.5 * 1.9**2, -1.9),  # near the old value 1: the plain error of the target 3
        (1.5, 0.5 * 1.8**2, 0.0),  # nearer the target than allowed: that of 1.2, and no gradient
        (0.5, 0.5 * 2.5**2, -2.5),  # moved the wrong way: the plain one is larger
        (6.0, 0.5 * 3.0**2, 3.0),  # far beyond the target: as well
    ],
)
def test_clipped_value_loss_by_hand(value: float, loss: float, slope: float) -> None:
    prediction = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    old, target = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 3.0, dtype=torch.float64)
    got = clipped_squared_error(prediction, target, old, clip=0.2)
    assert got.shape == (1,)
    assert got.item() == pytest.approx(loss, rel=1e-12)
    got.sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.item() == pytest.approx(slope, rel=1e-12)
    torch.testing.assert_close(
        clipped_squared_error(prediction, target, old, 1e9), squared_error(prediction, target)
    )


def test_advantages_of_all_tasks_together_keep_what_tells_tasks_apart() -> None:
    advantage = torch.randn(3, 40, 2, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1])[:, None, None] + 2.0
    got = normalize_over_tasks(advantage)
    assert got.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert got.std().item() == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(got[1].std() / got[2].std(), advantage[1].std() / advantage[2].std())


def test_ppo_loss_is_per_task() -> None:
    log_prob, old, advantage = torch.randn(3, 4, 6, dtype=torch.float64)
    together = ppo_policy_loss(log_prob, old, advantage, 0.2)
    for task in range(4):
        rows = slice(task, task + 1)
        alone = ppo_policy_loss(log_prob[rows], old[rows], advantage[rows], 0.2)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[rows], theirs)


def test_approximate_kl_estimates_the_kl() -> None:
    old, new = Normal(torch.tensor(0.0).double(), 1.0), Normal(torch.tensor(0.1).double(), 1.05)
    x = old.sample((400_000,))
    got = ppo_policy_loss(new.log_prob(x)[None], old.log_prob(x)[None], torch.ones(1, len(x)), 0.2)
    assert got.approximate_kl.item() == pytest.approx(kl_divergence(old, new).item(), rel=0.02)


def test_squared_error_by_hand() -> None:
    got = squared_error(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 4.0]]))
    assert got.tolist() == [1.25, 4.0]  # half of the means of (1, 4) and (0, 16)


def test_normalize_per_task() -> None:
    advantage = torch.randn(3, 5, 4, dtype=torch.float64) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None] + 7
    got = normalize_per_task(advantage)
    assert got.shape == advantage.shape
    for task in range(3):
        assert got[task].mean().item() == pytest.approx(0.0, abs=1e-9)
        assert got[task].std().item() == pytest.approx(1.0, abs=1e-4)
    changed = advantage.clone()
    changed[0] *= 50  # the scale of one task does not touch the others
    torch.testing.assert_close(normalize_per_task(changed)[1:], got[1:], rtol=0, atol=0)


def test_normalize_a_constant_gives_zeros() -> None:
    assert torch.equal(normalize_per_task(torch.full((1, 4), 3.0)), torch.zeros(1, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_finite_mean_leaves_out_what_is_not_finite(bad: float) -> None:
    values = torch.rand(7)
    assert torch.equal(finite_mean(values), values.mean())
    assert finite_mean(torch.tensor([1.0, bad, 4.0])).item() == 2.5
    assert finite_mean(torch.tensor([bad, bad])).item() == 0.0
