from __future__ import annotations

import torch
from torch import nn

from varshare_rl.nn import VarShareLayer, VarShareLoRALayer
from varshare_rl.nn.stochastic import (
    hold_noise,
    load_noise_state,
    noise_state,
    posterior_mean,
    release_noise,
    stochastic_layers,
)


def network() -> nn.ModuleDict:
    return nn.ModuleDict({
        "low": VarShareLoRALayer(3, 2, 2, rank=1),
        "plain": nn.Linear(3, 2),
        "inner": nn.Sequential(VarShareLayer(3, 2, 2)),
    })  # fmt: skip


def test_finds_every_stochastic_layer_by_name() -> None:
    assert [name for name, _ in stochastic_layers(network())] == ["low", "inner.0"]


def test_noise_is_held_until_released() -> None:
    module = network()
    assert noise_state(module) == {"low": None, "inner.0": None}
    hold_noise(module)
    held = noise_state(module)
    assert [tuple(noise.shape) for noise in held["low"] or []] == [(2, 1, 3), (2, 2, 1)]
    assert [tuple(noise.shape) for noise in held["inner.0"] or []] == [(2, 2, 3)]
    release_noise(module)
    assert noise_state(module) == {"low": None, "inner.0": None}


def test_noise_round_trip_gives_the_same_outputs() -> None:
    one, other = network(), network()
    other.load_state_dict(one.state_dict())
    hold_noise(one)
    hold_noise(other)
    x, ids = torch.randn(2, 4, 3), torch.arange(2)
    assert not torch.equal(one["low"](x, ids), other["low"](x, ids))
    load_noise_state(other, noise_state(one))
    assert torch.equal(one["low"](x, ids), other["low"](x, ids))
    assert torch.equal(one["inner"][0](x, ids), other["inner"][0](x, ids))
    load_noise_state(other, {"low": None, "inner.0": None})
    assert other["low"].noise is None


def test_posterior_mean_is_for_a_while_and_leaves_the_mode_as_it_was() -> None:
    layer = VarShareLayer(3, 2, 2)
    x, ids = torch.randn(2, 4, 3), torch.arange(2)
    with posterior_mean(layer):
        assert torch.equal(layer(x, ids), layer(x, ids))
    assert layer.training
    layer.eval()
    with posterior_mean(layer):
        pass
    assert not layer.training
