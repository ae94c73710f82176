"""Plain networks against the networks they are made from."""

from __future__ import annotations

import pytest
import torch
from naive import scramble
from torch import nn

from varshare_rl.errors import UserError
from varshare_rl.nn import L2SoftConfig, NetworkConfig, Posterior, SharedConfig, VarShareLoRAConfig
from varshare_rl.nn.merge import OneTask, merged
from varshare_rl.nn.mlp import ACTIVATIONS
from varshare_rl.registry import registered

NAMES = (
    "shared", "independent", "varshare", "varshare_lora", "lora", "l2_soft", "task_embedding", "multi_head",
)  # fmt: skip
ARCHITECTURES = {name: registered("network")[name] for name in NAMES}
IN, OUT, TASKS = 5, 6, 4


def build(architecture: NetworkConfig) -> nn.Module:
    network = architecture.build(IN, OUT, TASKS, Posterior())
    scramble(network)
    return network.eval()


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merged_network_is_the_posterior_mean_of_its_task(name: str, layer_norm: bool) -> None:
    network = build(ARCHITECTURES[name](hidden=[7, 6], layer_norm=layer_norm)).double()
    x = torch.randn(TASKS, 9, IN, dtype=torch.float64)
    expected = network(x, torch.arange(TASKS))
    assert not torch.allclose(expected[0], network(x[:1], torch.tensor([1]))[0])  # tasks do differ
    for task in range(TASKS):
        plain = merged(network, task)
        assert {type(module) for module in plain} <= {nn.Linear, nn.Tanh, nn.LayerNorm}
        torch.testing.assert_close(plain(x[task]), expected[task], rtol=0, atol=1e-12)


def test_residuals_of_full_rank_and_scaled_ones_are_folded() -> None:
    x = torch.randn(TASKS, 9, IN)
    for options in (L2SoftConfig(hidden=[7], rank=None), L2SoftConfig(hidden=[7], rank=2, alpha=6.0)):
        network = build(options)
        expected = network(x, torch.arange(TASKS))[2]
        torch.testing.assert_close(merged(network, 2)(x[2]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_its_module(activation: str) -> None:
    network = build(VarShareLoRAConfig(hidden=[7], activation=activation))
    x = torch.randn(TASKS, 9, IN)
    torch.testing.assert_close(merged(network, 2)(x[2]), network(x, torch.arange(TASKS))[2], rtol=1e-5, atol=1e-6)


def test_parameters_are_copies() -> None:
    network = build(SharedConfig(hidden=[7]))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        for parameter in merged(network, 0).parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", registered("network"))
def test_every_network_has_a_form_of_one_task(name: str) -> None:
    network = build(registered("network")[name](hidden=[7, 6]))
    x = torch.randn(TASKS, 5, IN)
    wanted = network(x, torch.arange(TASKS))
    for task in range(TASKS):
        torch.testing.assert_close(OneTask(network, task)(x[task]), wanted[task], rtol=0, atol=1e-5)
    with pytest.raises(IndexError, match=f"unknown task id {TASKS}"):
        OneTask(network, TASKS)(x[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("task", [-1, TASKS])
def test_an_unknown_task_is_named(name: str, task: int) -> None:
    with pytest.raises(IndexError, match=f"unknown task id {task}: this network has {TASKS} tasks"):
        merged(build(ARCHITECTURES[name](hidden=[7])), task)


def test_what_is_no_perceptron_per_task_is_refused() -> None:
    with pytest.raises(UserError, match="GRU has no plain form"):
        merged(nn.GRU(2, 2), 0)
    network = build(SharedConfig(hidden=[7]))
    network.get_submodule("layers")[1] = nn.Bilinear(2, 2, 2)  # type: ignore[operator]
    with pytest.raises(UserError, match="Bilinear has no weight of one task"):
        merged(network, 0)
