"""``network=lora``: dropout on residuals, and residuals in some layers only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from varshare_rl.errors import UserError
from varshare_rl.fields import check_bounds
from varshare_rl.nn import LoRAConfig, Posterior
from varshare_rl.nn.config import Blocks
from varshare_rl.nn.lora import ResidualLayer
from varshare_rl.nn.shared import SharedLayer


def network_of(**options: Any) -> Any:
    config = LoRAConfig(hidden=[6, 6], rank=2, **options)
    check_bounds(config, "network.")
    network = config.build(4, 3, 2, Posterior())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.5)
    return network


LAYERS: dict[str, tuple[Any, list[bool]]] = {
    "all": ("all", [True, True, True]),
    "last": ("last", [False, False, True]),
    "names": (["layers.0", "layers.2"], [True, False, True]),
}


@pytest.mark.parametrize("case", LAYERS)
def test_residuals_in_the_chosen_layers_only(case: str) -> None:
    layers, chosen = LAYERS[case]
    network = network_of(layers=layers)
    assert [isinstance(layer, ResidualLayer) for layer in network.layers] == chosen
    assert all(isinstance(layer, ResidualLayer | SharedLayer) for layer in network.layers)
    x = torch.randn(4).expand(2, 5, 4)
    y = network(x, torch.arange(2))
    assert not torch.allclose(y[0], y[1])
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_last_layer_of_residual_blocks() -> None:
    network = network_of(layers="last", blocks=Blocks.bronet)
    assert [isinstance(layer, ResidualLayer) for layer in network.layers] == [False] * 3 + [True]


@pytest.mark.parametrize("layers", ["first", [], [1], 3, None])
def test_what_is_no_choice_of_layers_is_refused(layers: Any) -> None:
    with pytest.raises(UserError, match=r"network\.layers is .* give all, last, or a list of names"):
        network_of(layers=layers)


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"network\.layers has 'layers\.3'.*layers\.0, layers\.1, layers\.2"):
        network_of(layers=["layers.3"])


def test_dropout_acts_on_the_residual_in_training_only_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = ResidualLayer(4, 3, 2, rank=2, dropout=0.5)
    torch.nn.init.normal_(layer.factors_A)
    torch.nn.init.normal_(layer.factors_B)
    x, ids = torch.randn(2, 1, 4), torch.arange(2)
    exact = layer.eval()(x, ids)
    assert torch.equal(layer(x, ids), exact)
    layer.train()
    draws = torch.stack([layer(x, ids) for _ in range(2000)])
    assert bool((draws.std(0) > 0).all())
    assert bool(((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 2000**0.5).all())
    with torch.no_grad():
        layer.factors_B.zero_()
    torch.testing.assert_close(layer(x, ids), torch.nn.functional.linear(x, layer.theta, layer.bias))
