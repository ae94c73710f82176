"""The quick activation, and copies in one product against copies one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from varshare_rl.nn.mlp import StackedLinear, StackedMLP, StackedNorm, tanh


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


def test_one_input_for_all_is_the_same_as_equal_inputs() -> None:
    layer = StackedLinear(3, 5, 4)
    x = torch.randn(7, 5)
    together = layer(x)
    torch.testing.assert_close(together, layer(x.expand(3, 7, 5)))
    for copy in range(3):
        torch.testing.assert_close(together[copy], F.linear(x, layer.weights[copy], layer.biases[copy]))
    assert layer(x[:0]).shape == (3, 0, 4)


def test_copies_start_apart() -> None:
    layer = StackedLinear(2, 5, 4)
    assert (layer.weights[0] != layer.weights[1]).all()
    assert layer.weights.abs().max() <= 5**-0.5


def test_norms_start_as_layer_norms_and_belong_to_their_copy() -> None:
    norm = StackedNorm(2, 6)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (6,)))
    with torch.no_grad():
        norm.scales[1], norm.offsets[1] = 2.0, -1.0
    torch.testing.assert_close(norm(x)[0], F.layer_norm(x[0], (6,)))
    torch.testing.assert_close(norm(x)[1], 2 * F.layer_norm(x[1], (6,)) - 1)


def test_the_last_layer_has_no_activation() -> None:
    network = StackedMLP(2, [3, 4, 1], "relu", layer_norm=False)
    with torch.no_grad():
        network.layers[-1].weights.zero_()
        network.layers[-1].biases.fill_(-5.0)
    assert (network(torch.randn(6, 3)) == -5.0).all()
