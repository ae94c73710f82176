from __future__ import annotations

import pytest
import torch
from helpers import hold_noise
from torch import nn

from varshare_rl.nn import VarShareLayer, VarShareLoRALayer
from varshare_rl.nn.layer import penalized_layers
from varshare_rl.nn.stochastic import RowNoise, WeightNoise, holding, posterior_mean, theta_only
from varshare_rl.nn.variational import stochastic_layers

TASKS = 2


def network() -> nn.ModuleDict:
    return nn.ModuleDict({
        "low": VarShareLoRALayer(3, 2, TASKS, rank=1),
        "plain": nn.Linear(3, 2),
        "inner": nn.Sequential(VarShareLayer(3, 2, TASKS)),
    })  # fmt: skip


def test_finds_every_layer_by_name() -> None:
    assert [name for name, _ in stochastic_layers(network())] == ["low", "inner.0"]
    assert [name for name, _ in penalized_layers(network())] == ["low", "inner.0"]


def test_noise_is_held_inside_and_as_before_afterwards() -> None:
    module = network()
    layers = dict(stochastic_layers(module))
    noise = {name: WeightNoise(layer.draw_noise(TASKS)) for name, layer in layers.items()}
    assert [tuple(value.shape) for value in noise["low"].values] == [(2, 1, 3), (2, 2, 1)]
    assert [tuple(value.shape) for value in noise["inner.0"].values] == [(2, 2, 3)]
    x, ids = torch.randn(TASKS, 4, 3), torch.arange(TASKS)
    hold_noise(module)
    before = {name: layer.noise for name, layer in layers.items()}
    outside = module["low"](x, ids)
    with holding(layers, noise):
        inside = module["low"](x, ids)
        assert torch.equal(inside, module["low"](x, ids))
        assert not torch.equal(inside, outside)
    assert {name: layer.noise for name, layer in layers.items()} == before
    with pytest.raises(RuntimeError, match="inside"), holding(layers, noise):  # also when something fails inside
        raise RuntimeError("inside")
    assert torch.equal(module["low"](x, ids), outside)


@pytest.mark.parametrize("name", ["low", "full"])
def test_rows_may_be_dealt_to_draws_in_any_way(name: str) -> None:
    """Each row sees the weights of its own draw, whoever shares it."""
    layer = VarShareLoRALayer(3, 2, TASKS, rank=2) if name == "low" else VarShareLayer(3, 2, TASKS)
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    tasks = torch.tensor([1, 0, 0, 1, 1])
    values = tuple(value.double() for value in layer.draw_noise(len(tasks)))
    index = torch.tensor([[2, 1, 2, 2], [0, 4, 0, 3]])
    x = torch.randn(TASKS, 4, 3, dtype=torch.float64)
    layer.noise = WeightNoise(values, index, tasks)
    y = layer(x, torch.arange(TASKS))
    for task in range(TASKS):
        for row in range(4):
            draw = int(index[task, row])
            assert int(tasks[draw]) == task
            factors = [value[draw : draw + 1] for value in values]
            weights = layer.drawn(factors, 1.0, torch.tensor([task]))
            torch.testing.assert_close(y[task, row], layer.output(x[task : task + 1, row : row + 1], weights)[0, 0])


def test_row_noise_is_a_draw_of_the_output() -> None:
    layer = VarShareLoRALayer(3, 2, TASKS, rank=2)
    x, ids = torch.randn(TASKS, 4, 3), torch.arange(TASKS)
    noise = layer.draw_row_noise((TASKS, 4))
    assert isinstance(noise, RowNoise)
    assert [tuple(value.shape) for value in noise.values] == [(2, 4, 2), (2, 4, 2)]
    layer.noise = noise
    assert torch.equal(layer(x, ids), layer(x, ids))
    layer.noise = RowNoise(tuple(torch.zeros_like(value) for value in noise.values))
    torch.testing.assert_close(layer(x, ids), layer.eval()(x, ids))


def test_theta_alone() -> None:
    module = network()
    hold_noise(module)
    x, ids = torch.randn(TASKS, 4, 3), torch.arange(TASKS)
    for layer in (module["low"], module["inner"][0]):
        with torch.no_grad():
            for name in layer.per_task_parameters:
                layer.get_parameter(name).fill_(0.5)
        with theta_only(module):
            alone = layer(x, ids)
            torch.testing.assert_close(alone, nn.functional.linear(x, layer.theta, layer.bias))
        assert not torch.allclose(layer(x, ids), alone)


def test_posterior_mean_is_for_a_while_and_leaves_the_mode_as_it_was() -> None:
    layer = VarShareLayer(3, 2, TASKS)
    x, ids = torch.randn(TASKS, 4, 3), torch.arange(TASKS)
    with posterior_mean(layer):
        assert torch.equal(layer(x, ids), layer(x, ids))
    assert layer.training
    layer.eval()
    with posterior_mean(layer):
        pass
    assert not layer.training
