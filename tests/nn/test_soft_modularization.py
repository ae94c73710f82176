"""The routing."""

from __future__ import annotations

import torch

from varshare_rl.nn import Posterior, SoftModularizationConfig
from varshare_rl.nn.soft_modularization import SoftModularizationNetwork


def network(hidden: list[int], modules: int) -> SoftModularizationNetwork:
    return SoftModularizationConfig(hidden=hidden, modules=modules, embedding=6).build(5, 3, 4, Posterior())


def test_rows_of_the_routing_sum_to_one() -> None:
    made = network([7, 8, 9], modules=3)
    routing = made.routing(torch.randn(10, 6) * 3)
    assert [tuple(part.shape) for part in routing] == [(10, 3, 3), (10, 3, 3), (10, 1, 3)]
    for part in routing:
        assert (part >= 0).all()
        torch.testing.assert_close(part.sum(-1), torch.ones(10, part.shape[1]))


def test_routes_depend_on_the_state_and_on_the_task() -> None:
    made = network([7, 8], modules=2)
    features = made.encoder(torch.randn(2, 5), 0)
    one, other = (made.routing(features * embedding) for embedding in made.embeddings[:2])
    for here, there in zip(one, other, strict=True):
        assert (here - there).abs().max() > 1e-4
        assert (here[0] - here[1]).abs().max() > 1e-4


def test_equal_routes_average_the_modules() -> None:
    """One layer, route logits of zero: the head sees the mean of the modules' outputs."""
    made = network([7], modules=4).double()
    with torch.no_grad():
        made.routes[0].theta.zero_()
        made.routes[0].bias.zero_()
    x = torch.randn(6, 5, dtype=torch.float64)
    inputs = torch.tanh(made.encoder(x, 0))
    layer = made.modules_by_layer[0]
    outputs = [
        torch.tanh(inputs @ weight.T + bias) for weight, bias in zip(layer.weights, layer.biases, strict=True)
    ]
    mean = torch.stack(outputs).mean(0)
    torch.testing.assert_close(made(x, 2), mean @ made.head.theta.T + made.head.bias)


def test_features_are_as_wide_as_the_first_layer_unless_given() -> None:
    assert SoftModularizationConfig(hidden=[12, 8]).build(5, 3, 4, Posterior()).embeddings.shape == (4, 12)
    assert network([12, 8], 2).embeddings.shape == (4, 6)
