"""Parameters are composed, not outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from varshare_rl.nn import PaCoConfig, Posterior


def test_a_layer_is_linear_with_composed_weights() -> None:
    network = PaCoConfig(hidden=[], parameter_sets=3).build(5, 2, 4, Posterior()).double()
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    y = network(x, torch.arange(4))
    (layer,) = network.layers
    for task, composition in enumerate(network.compositions):
        weight = torch.einsum("s,sgf->gf", composition, layer.weights)
        bias = torch.einsum("s,sg->g", composition, layer.biases)
        torch.testing.assert_close(y[task], F.linear(x[task], weight, bias))


def test_outputs_are_not_mixed() -> None:
    """With a hidden layer the mixture of the sets' outputs is something else than the output of the mixed set."""
    network = PaCoConfig(hidden=[8], parameter_sets=2).build(5, 2, 3, Posterior())
    x = torch.randn(6, 5)
    with torch.no_grad():
        network.compositions.copy_(torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]))
        mixed = 0.5 * network(x, 1) + 0.5 * network(x, 2)
        assert (network(x, 0) - mixed).abs().max() > 1e-3


def test_a_single_set_is_that_network() -> None:
    network = PaCoConfig(hidden=[8], parameter_sets=2, activation="relu").build(5, 2, 3, Posterior())
    with torch.no_grad():
        network.compositions[1] = torch.tensor([0.0, 1.0])
    x = torch.randn(6, 5)
    first, second = network.layers
    hidden = torch.relu(F.linear(x, first.weights[1], first.biases[1]))
    torch.testing.assert_close(network(x, 1), F.linear(hidden, second.weights[1], second.biases[1]))


def test_composed_weights_start_with_the_usual_size() -> None:
    network = PaCoConfig(hidden=[200], parameter_sets=5).build(100, 2, 6, Posterior())
    composed = torch.einsum("ts,sgf->tgf", network.compositions, network.layers[0].weights)
    usual = 1 / (3 * 100) ** 0.5  # of the uniform distribution on +-1 / sqrt(100)
    torch.testing.assert_close(composed.std((1, 2)), torch.full((6,), usual), rtol=0.05, atol=0)
