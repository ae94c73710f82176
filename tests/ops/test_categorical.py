from __future__ import annotations

import pytest
import torch

from varshare_rl.ops.rl import categorical_cross_entropy, categorical_value, support, two_hot


def test_two_hot_by_hand() -> None:
    # atoms -2, -1, 0, 1, 2
    got = two_hot(torch.tensor([-2.0, -0.75, 0.0, 1.5, 2.0, 7.0, -3.0]), -2.0, 2.0, 5)
    expected = [
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.75, 0.25, 0.0, 0.0],
        [0.0, 0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.5, 0.5],
        [0.0, 0.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],  # beyond the ends: the ends
        [1.0, 0.0, 0.0, 0.0, 0.0],
    ]
    torch.testing.assert_close(got, torch.tensor(expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_own_tasks_loss_so(bad: float) -> None:
    """And no other's: an infinite target is not the end of the support."""
    target = torch.tensor([[0.5, 0.0], [bad, 0.0], [0.5, 0.0]])
    losses = categorical_cross_entropy(torch.zeros(3, 2, 5), target, -2.0, 2.0)
    torch.testing.assert_close(losses, torch.tensor([5.0, float("nan"), 5.0]).log(), equal_nan=True)


@pytest.mark.parametrize(("low", "high", "bins"), [(-10.0, 10.0, 101), (-1.0, 4.0, 7), (0.0, 1.0, 2)])
def test_the_mean_of_the_two_hot_is_the_number(low: float, high: float, bins: int) -> None:
    x = torch.rand(3, 500, dtype=torch.float64) * (high - low) + low
    weights = two_hot(x, low, high, bins)
    assert weights.shape == (3, 500, bins)
    assert (weights >= 0).all()
    assert ((weights > 0).sum(-1) <= 2).all()
    atoms = torch.linspace(low, high, bins, dtype=torch.float64)
    torch.testing.assert_close((weights * atoms).sum(-1), x, rtol=0, atol=1e-12 * (high - low))


def test_atoms_are_evenly_spaced() -> None:
    assert support(-10.0, 10.0, 101).tolist() == pytest.approx([-10 + 0.2 * k for k in range(101)], abs=1e-6)


def test_value_and_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0], [0.5, 0.5, 0.5]]]).log_softmax(-1)
    atoms = support(-1.0, 1.0, 3)
    p = logits.exp()
    torch.testing.assert_close(categorical_value(logits, atoms), p[..., 2] - p[..., 0])
    loss = categorical_cross_entropy(logits, torch.tensor([[0.25, -5.0]]), -1.0, 1.0)
    by_hand = -(0.75 * logits[0, 0, 1] + 0.25 * logits[0, 0, 2] + logits[0, 1, 0]) / 2
    assert loss.shape == (1,)
    torch.testing.assert_close(loss[0], by_hand)


def test_the_cross_entropy_is_least_at_the_two_hot_itself() -> None:
    """Its gradient is ``softmax - two_hot``; descent brings the mean to the target."""
    logits = torch.zeros(1, 1, 11, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.37]], dtype=torch.float64)
    (grad,) = torch.autograd.grad(categorical_cross_entropy(logits, target, -1.0, 1.0).sum(), logits)
    torch.testing.assert_close(grad, logits.softmax(-1) - two_hot(target, -1.0, 1.0, 11))
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        categorical_cross_entropy(logits, target, -1.0, 1.0).sum().backward()
        optimizer.step()
    assert categorical_value(logits, torch.linspace(-1, 1, 11).double()).item() == pytest.approx(0.37, abs=1e-3)
