from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from varshare_rl.nn.packnet import PackedLayer
from varshare_rl.ops.linear import linear


def layer_with_owned(owned: torch.Tensor) -> PackedLayer:
    layer = PackedLayer(4, 3)
    layer.allot(~owned)
    return layer


def test_a_fresh_layer_is_a_linear_one() -> None:
    layer = PackedLayer(4, 3)
    x = torch.randn(1, 5, 4)
    assert torch.equal(layer(x, 0), linear(x, layer.theta, layer.bias))


def test_owned_entries_get_no_gradient_and_are_not_read() -> None:
    owned = torch.rand(3, 4) < 0.5
    layer = layer_with_owned(owned)
    before = layer.weight().detach()
    layer(torch.randn(1, 5, 4), 0).square().sum().backward()
    assert layer.theta.grad is not None
    assert torch.equal(layer.theta.grad == 0, owned)
    with torch.no_grad():
        layer.theta.add_(1.0)
    assert torch.equal(layer.weight() == before, owned)


@pytest.mark.parametrize(("share", "kept"), [(0.25, 2), (0.3, 2), (0.01, 1), (1.0, 5), (0.5, 3)])
def test_pruning_counts_free_entries_up(share: float, kept: int) -> None:
    owned = torch.ones(3, 4, dtype=torch.bool)
    owned.view(-1)[:5] = False
    layer = layer_with_owned(owned)
    with torch.no_grad():
        layer.theta.fill_(0.5)  # ties are cut as well
    layer.prune(share)
    assert int(layer.trained.sum()) == kept
    assert not (layer.trained & owned).any()
    trained = layer.trained.clone()
    layer.prune(0.1)
    assert torch.equal(layer.trained, trained)


def test_the_largest_entries_are_kept_whatever_their_sign() -> None:
    layer = PackedLayer(4, 1)
    with torch.no_grad():
        layer.theta.copy_(torch.tensor([[0.1, -3.0, 2.0, -0.2]]))
    layer.prune(0.5)
    assert torch.equal(layer.weight(), torch.tensor([[0.0, -3.0, 2.0, 0.0]]))


def test_a_copy_that_follows_the_parameters_prunes_with_them() -> None:
    layer = PackedLayer(4, 3)
    target = deepcopy(layer).requires_grad_(False)
    layer.prune(0.25)
    with torch.no_grad():
        for mine, its in zip(target.parameters(), layer.parameters(), strict=True):
            mine.copy_(its)
    assert torch.equal(target.weight(), layer.weight())


def test_a_layer_without_free_entries_prunes_nothing() -> None:
    layer = layer_with_owned(torch.ones(3, 4, dtype=torch.bool))
    before = layer.weight().detach()
    layer.prune(0.25)
    assert torch.equal(layer.weight(), before)
    assert bool(layer.pruned)
