"""The attention and where its gradient goes."""

from __future__ import annotations

import torch

from varshare_rl.nn import CAREConfig, Posterior
from varshare_rl.nn.care import CARENetwork


def network() -> CARENetwork:
    return CAREConfig(hidden=[8], experts=3, encoder_width=4, context=5).build(6, 2, 4, Posterior())


def test_attention_is_a_weight_for_every_encoder() -> None:
    """All attention on one encoder: the others do not matter."""
    made = network()
    x, ids = torch.randn(4, 7, 6), torch.arange(4)
    with torch.no_grad():
        made.attention.layers[-1].theta.zero_()
        made.attention.layers[-1].bias.copy_(torch.tensor([0.0, 60.0, 0.0]))
        before = made(x, ids)
        for layer in made.encoders.layers:
            layer.weights[[0, 2]] += 1.0
        torch.testing.assert_close(made(x, ids), before)
        made.encoders.layers[0].weights[1] += 1.0
        assert (made(x, ids) - before).abs().max() > 1e-3


def test_no_gradient_runs_from_the_attention_into_the_context() -> None:
    made = network()
    with torch.no_grad():
        made.trunk.layers[0].theta[:, 4:] = 0.0  # the trunk does not look at the context
    made(torch.randn(4, 7, 6), torch.arange(4)).square().sum().backward()
    assert made.embeddings.grad is not None
    assert (made.embeddings.grad == 0).all()
    assert made.attention.layers[0].theta.grad.abs().sum() > 0


def test_the_trunk_is_told_the_context() -> None:
    made = network()
    with torch.no_grad():
        made.attention.layers[-1].theta.zero_()  # the same attention for all tasks
    y = made(torch.randn(1, 7, 6).expand(4, 7, 6), torch.arange(4))
    assert (y[1:] - y[0]).abs().amax((1, 2)).min() > 1e-4
