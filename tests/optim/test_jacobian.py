"""Gradients per task from one backward pass against one backward pass per task."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import hold_noise
from torch import Tensor, nn

from varshare_rl.nn import Posterior, SharedConfig, VarShareLoRAConfig
from varshare_rl.nn.config import Blocks
from varshare_rl.nn.critic import CriticConfig, TwinQ
from varshare_rl.optim.jacobian import TaskGradients
from varshare_rl.optim.optimizer import roles
from varshare_rl.registry import registered

IN, OUT, TASKS, BATCH = 5, 3, 4, 6
IDS = torch.arange(TASKS)
EXACT = {"rtol": 1e-10, "atol": 1e-10}
#: Architectures all of whose shared parameters come out of one pass.
RECORDED = {"shared", "varshare", "varshare_lora", "lora", "l2_soft", "multi_head"}


def scrambled(network: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    network = network.to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter) * 0.3
    hold_noise(network)
    return network


def build(name: str, layer_norm: bool) -> nn.Module:
    options = registered("network")[name](hidden=[7, 6], layer_norm=layer_norm)
    return scrambled(options.build(IN, OUT, TASKS, Posterior()))


def split(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Shared and own parameters."""
    found = roles(network)
    return [r.parameter for r in found if not r.own], [r.parameter for r in found if r.own]


def one_by_one(losses: Tensor, shared: list[nn.Parameter]) -> Tensor:
    """The Jacobian of ``losses / T`` by one backward pass per task."""
    rows = []
    for loss in losses / len(losses):
        grads = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def losses_of(network: nn.Module, dtype: torch.dtype = torch.float64, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TASKS, batch, IN, generator=generator, dtype=dtype)
    return network(x, IDS).square().mean((1, 2))


class Watched(TaskGradients):
    """Notes which parameters took a pass per task."""

    def __init__(self, trained: nn.Module, shared: list[nn.Parameter]) -> None:
        super().__init__(trained, shared)
        self.slow: list[int] = []

    def _one_at_a_time(self, losses: Tensor, slow: list[int], views: list[Tensor]) -> None:
        self.slow = slow
        super()._one_at_a_time(losses, slow, views)


def assert_equal_to_one_by_one(network: nn.Module, make: Callable[[], Tensor]) -> Watched:
    """Three steps on the losses that ``make`` computes; the parameters that took a pass per task."""
    shared, own = split(network)
    expected = one_by_one(make(), shared)
    network.zero_grad()
    torch.autograd.backward(make().mean())
    own_expected = [None if p.grad is None else p.grad.clone() for p in own]
    gradients = Watched(network, shared)
    for _ in range(3):
        network.zero_grad()
        torch.testing.assert_close(gradients(make()), expected, **EXACT)
        assert all(parameter.grad is None for parameter in shared)
        for parameter, grad in zip(own, own_expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0)
    return gradients


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("name", [name for name in registered("network") if name != "independent"])
def test_rows_are_the_tasks_gradients(name: str, layer_norm: bool) -> None:
    network = build(name, layer_norm)
    gradients = assert_equal_to_one_by_one(network, lambda: losses_of(network))
    if name in RECORDED:
        assert gradients.slow == []
        assert gradients.mixed == set()


def test_residual_blocks_need_one_pass() -> None:
    network = scrambled(VarShareLoRAConfig(hidden=[6, 6], blocks=Blocks.bronet).build(IN, OUT, TASKS, Posterior()))
    gradients = assert_equal_to_one_by_one(network, lambda: losses_of(network))
    assert gradients.slow == []


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_rows_of_large_float32_layers(name: str) -> None:
    """The oneDNN products."""
    options = registered("network")[name](hidden=[160, 130])
    network = scrambled(options.build(IN, OUT, TASKS, Posterior()), torch.float32)
    shared, _ = split(network)
    gradients = Watched(network, shared)
    losses = losses_of(network, torch.float32, 70)
    expected = one_by_one(losses, shared)
    torch.testing.assert_close(gradients(losses), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert gradients.slow == []


def test_sampled_weights_and_twin_critics() -> None:
    options = VarShareLoRAConfig(hidden=[7, 6], layer_norm=True)
    critic = TwinQ(lambda: options.build(IN, 1, TASKS, Posterior()), TASKS, CriticConfig())
    scrambled(critic)

    def losses() -> Tensor:
        torch.manual_seed(3)
        obs, action = torch.randn(TASKS, BATCH, 3).double(), torch.randn(TASKS, BATCH, 2).double()
        return critic(obs, action, IDS).square().mean(-1).sum(0)

    assert assert_equal_to_one_by_one(critic, losses).slow == []


class Outside(nn.Module):
    """A network with parameters outside its layers: one on its own, one of a layer used in a second way."""

    def __init__(self) -> None:
        super().__init__()
        self.network = SharedConfig(hidden=[7, 6]).build(IN, OUT, TASKS, Posterior())
        self.scale = nn.Parameter(torch.ones(OUT))

    def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
        y: Tensor = self.network(x, task_ids) * self.scale
        return y + self.network.layers[1].theta.square().sum() * x.mean((1, 2), keepdim=True)


def test_parameters_that_are_used_otherwise_take_a_pass_per_task() -> None:
    network = scrambled(Outside())
    gradients = assert_equal_to_one_by_one(network, lambda: losses_of(network))
    names = [name for name, _ in network.named_parameters()]
    assert {names[index] for index in gradients.slow} == {"scale", "network.layers.1.theta"}


class Mixing(nn.Module):
    """Tasks look at each other's features between two recorded layers, after the first step."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.network = SharedConfig(hidden=[7, 6]).build(IN, OUT, TASKS, Posterior())
        self.gate = gate

    def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
        first, *rest = self.network.layers
        h = torch.tanh(first(x, task_ids))
        h = h + self.gate * h.mean(0, keepdim=True)
        for layer in rest[:-1]:
            h = torch.tanh(layer(h, task_ids))
        return rest[-1](h, task_ids)


def test_layers_before_tasks_mix_take_a_pass_per_task() -> None:
    network = scrambled(Mixing(0.5))
    gradients = assert_equal_to_one_by_one(network, lambda: losses_of(network))
    assert gradients.slow == [0, 1]  # weight and bias of the first layer
    again = Watched(copy.deepcopy(network), split(network)[0])
    again.load_state(gradients.state())
    assert again.mixed == {0, 1}


class FarPairs(nn.Module):
    """Of 80 tasks the first looks at the 33rd between two recorded layers, or at the 65th."""

    def __init__(self, other: int) -> None:
        super().__init__()
        self.network = SharedConfig(hidden=[7, 6]).build(IN, OUT, 80, Posterior())
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.network.layers
        ids = torch.arange(len(x))
        h = torch.tanh(first(x, ids))
        h = h + 0.1 * (ids == 0).view(-1, 1, 1) * h[self.other]
        for layer in rest:
            h = layer(h, ids)
        return h


@pytest.mark.parametrize("other", [1, 32, 64])
def test_no_two_tasks_are_too_far_apart_to_be_seen_mixing(other: int) -> None:
    network = scrambled(FarPairs(other))
    shared, _ = split(network)
    x = torch.randn(80, BATCH, IN).double()
    gradients = Watched(network, shared)
    rows = gradients(network(x).square().mean((1, 2)))
    assert gradients.mixed == {0, 1}
    torch.testing.assert_close(rows, one_by_one(network(x).square().mean((1, 2)), shared), **EXACT)


def test_many_tasks_that_do_not_mix_need_one_pass() -> None:
    tasks = 200
    network = scrambled(VarShareLoRAConfig(hidden=[7, 6]).build(IN, OUT, tasks, Posterior()), torch.float32)
    gradients = Watched(network, split(network)[0])
    gradients(network(torch.randn(tasks, BATCH, IN), torch.arange(tasks)).square().mean((1, 2)))
    assert gradients.slow == []


def test_mixing_that_starts_later_is_found_at_the_next_look() -> None:
    network = scrambled(Mixing(0.0))
    shared, _ = split(network)
    gradients = Watched(network, shared)
    gradients(losses_of(network))
    assert gradients.mixed == set()
    network.gate = 0.5
    torch.testing.assert_close(gradients(losses_of(network)), one_by_one(losses_of(network), shared), **EXACT)


def test_a_flat_batch_falls_back() -> None:
    network = scrambled(SharedConfig(hidden=[7]).build(IN, OUT, TASKS, Posterior()))
    x = torch.randn(TASKS * 2, IN).double()

    def losses() -> Tensor:
        return network(x, IDS.repeat_interleave(2)).square().mean(1).view(TASKS, 2).mean(1)

    gradients = assert_equal_to_one_by_one(network, losses)
    assert 2 in gradients.slow  # the second layer is not told the tasks


def test_parameters_that_are_not_reached() -> None:
    network = scrambled(
        nn.ModuleList([SharedConfig(hidden=[]).build(IN, OUT, TASKS, Posterior()) for _ in range(2)])
    )
    shared, _ = split(network)
    gradients = TaskGradients(network, shared)
    x = torch.randn(TASKS, BATCH, IN).double()
    rows = gradients(network[0](x, IDS).square().mean((1, 2)))
    assert gradients.reached == {0, 1}
    assert rows[:, : rows.shape[1] // 2].abs().sum() > 0
    assert rows[:, rows.shape[1] // 2 :].abs().sum() == 0


def test_a_copy_of_a_recorded_network_shares_the_recorder_and_records_nothing() -> None:
    network = build("shared", True)
    shared, _ = split(network)
    gradients = TaskGradients(network, shared)
    target = copy.deepcopy(network)
    assert target.layers[0].recorder is network.layers[0].recorder
    rows = gradients(losses_of(network) + losses_of(target))
    torch.testing.assert_close(rows, one_by_one(losses_of(network), shared), **EXACT)


def test_without_anyone_listening_a_recorded_network_is_the_plain_one() -> None:
    for name in registered("network"):
        network = build(name, True)
        plain = copy.deepcopy(network)
        torch.autograd.backward(losses_of(plain).mean())
        TaskGradients(network, split(network)[0])
        losses = losses_of(network)
        torch.testing.assert_close(losses, losses_of(plain), rtol=1e-14, atol=1e-14)
        torch.autograd.backward(losses.mean())
        for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
