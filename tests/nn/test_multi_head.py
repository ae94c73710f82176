"""Heads differ, the trunk does not."""

from __future__ import annotations

import torch

from varshare_rl.nn import MultiHeadConfig, Posterior


def test_with_equal_heads_tasks_are_alike() -> None:
    network = MultiHeadConfig(hidden=[8, 8]).build(5, 3, 4, Posterior())
    x = torch.randn(1, 6, 5).expand(4, 6, 5)
    assert (network(x, torch.arange(4))[1:] - network(x, torch.arange(4))[0]).abs().max() > 1e-2
    with torch.no_grad():
        network.layers[-1].weights.copy_(network.layers[-1].weights[:1].expand(4, -1, -1).clone())
        network.layers[-1].biases.copy_(network.layers[-1].biases[:1].expand(4, -1).clone())
    y = network(x, torch.arange(4))
    torch.testing.assert_close(y, y[:1].expand_as(y))
