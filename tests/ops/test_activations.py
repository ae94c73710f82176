from __future__ import annotations

import torch

from varshare_rl.ops.activations import tanh


def test_quick_tanh_is_tanh() -> None:
    x = torch.linspace(-30, 30, 20_001, requires_grad=True)
    exact = torch.tanh(x.detach().double())
    y = tanh(x)
    assert (y - exact).abs().max() < 2.5e-7
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (gradient - (1 - exact.square())).abs().max() < 1e-6


def test_tanh_leaves_its_argument_alone() -> None:
    x = torch.randn(100)
    before = x.clone()
    tanh(x)
    assert torch.equal(x, before)
