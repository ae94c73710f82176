from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from varshare_rl.ops.rl import (
    categorical_entropy,
    categorical_log_prob,
    clamp_inward,
    masked_logits,
    tanh_log_det,
    tanh_normal_log_prob,
)


def test_log_det_by_hand_and_where_the_plain_formula_breaks() -> None:
    raw = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(tanh_log_det(raw), torch.log(1 - torch.tanh(raw) ** 2))
    far = torch.tensor([40.0, -40.0])  # float32: 1 - tanh(40)^2 is 0 there
    assert torch.isinf(torch.log(1 - torch.tanh(far) ** 2)).all()
    assert tanh_log_det(far).tolist() == pytest.approx([2 * math.log(2) - 80.0] * 2, rel=1e-6)


def test_a_clamp_lets_gradients_through_that_lead_back() -> None:
    x = torch.tensor([-3.0, -3.0, 0.5, 0.5, 3.0, 3.0], requires_grad=True)
    slopes = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])  # a descent step goes the other way
    clamped = clamp_inward(x, -1.0, 2.0)
    (gradient,) = torch.autograd.grad(clamped, x, slopes, retain_graph=True)
    assert torch.equal(clamped, x.clamp(-1.0, 2.0))
    assert gradient.tolist() == [0.0, -1.0, 1.0, -1.0, 1.0, 0.0]
    (rows,) = torch.autograd.grad(clamped, x, torch.stack([slopes, -slopes]), is_grads_batched=True)
    assert rows.tolist() == [[0.0, -1.0, 1.0, -1.0, 1.0, 0.0], [-1.0, 0.0, -1.0, 1.0, 0.0, 1.0]]


def test_tanh_normal_equals_torch_distributions() -> None:
    raw, mean, log_std = torch.randn(3, 2, 7, 4, dtype=torch.float64)
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(cache_size=1)])
    expected = squashed.log_prob(torch.tanh(raw)).sum(-1)
    mask = torch.ones(2, 1, 4, dtype=torch.float64)
    torch.testing.assert_close(tanh_normal_log_prob(raw, mean, log_std, mask), expected)


def test_tanh_normal_leaves_masked_dimensions_out() -> None:
    raw, mean, log_std = torch.randn(3, 2, 7, 4, dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]).double().unsqueeze(1)
    got = tanh_normal_log_prob(raw, mean, log_std, mask)
    for task, size in ((0, 2), (1, 4)):
        one = (raw[task, :, :size], mean[task, :, :size], log_std[task, :, :size])
        torch.testing.assert_close(got[task], tanh_normal_log_prob(*one, torch.ones(size).double()))


def test_tanh_normal_density_integrates_to_one() -> None:
    action = torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1]
    raw = torch.atanh(action).unsqueeze(-1)
    density = tanh_normal_log_prob(
        raw, torch.full_like(raw, 0.4), torch.full_like(raw, -0.3), torch.ones(1).double()
    ).exp()
    assert float(torch.trapezoid(density, action)) == pytest.approx(1.0, abs=1e-4)


def test_masked_categorical() -> None:
    logits = torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]]).unsqueeze(1)
    log_probs = masked_logits(logits, mask)
    assert torch.isfinite(log_probs).all()
    assert (log_probs[0, :, 2:].exp() == 0).all()
    for task, size in ((0, 2), (1, 4)):
        reference = Categorical(logits=logits[task, :, :size])
        torch.testing.assert_close(log_probs[task, :, :size], reference.logits)
        torch.testing.assert_close(categorical_entropy(log_probs)[task], reference.entropy())
        action = reference.sample()
        torch.testing.assert_close(categorical_log_prob(log_probs[task], action), reference.log_prob(action))


def test_masked_categorical_gradients_are_finite_and_zero_outside() -> None:
    logits = torch.randn(1, 3, 4, requires_grad=True)
    log_probs = masked_logits(logits, torch.tensor([[[True, False, True, False]]]))
    (categorical_entropy(log_probs).sum() + log_probs[..., 0].sum()).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[..., [1, 3]] == 0).all()
    assert (logits.grad[..., [0, 2]] != 0).all()
