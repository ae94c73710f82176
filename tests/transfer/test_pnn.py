from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from toys import IN, OUT, TASK_IDS, Learning, bronet_spec, learn, make_pretrained, mlp_spec, outputs, weights

from varshare_rl.nn.progressive import Columns
from varshare_rl.transfer.method import NetworkSpec, StorageCost
from varshare_rl.transfer.methods.pnn import PNN, PNNConfig


def naive(columns: list[dict[str, Tensor]], x: Tensor, layers: int) -> Tensor:
    """Equation 2 of the paper for tanh columns, one after the other."""
    hidden: list[list[Tensor]] = []  # by column: the input of every layer
    for number, column in enumerate(columns):
        hidden.append([x])
        for place in range(layers):
            h = hidden[number][place]
            y = h @ column[f"layers.{place}.theta"].T + column[f"layers.{place}.bias"]
            if number > 0 and place > 0:
                scales = column[f"layers.{place}.scales"]
                seen = torch.cat([scales[j] * hidden[j][place] for j in range(number)], dim=-1)
                y = y + torch.relu(seen @ column[f"layers.{place}.project"].T) @ column[f"layers.{place}.mix"].T
            hidden[number].append(torch.tanh(y))
    return y


@pytest.mark.parametrize("pretrained", [False, True])
def test_outputs_are_those_of_the_paper(pretrained: bool) -> None:
    spec = mlp_spec(8, 8)
    given = make_pretrained(spec) if pretrained else None
    method = PNN(PNNConfig(lateral=4), spec, given)
    learn(method, 3, steps=3)
    x = torch.randn(1, 5, IN)
    columns = ([] if given is None else [dict(given.base)]) + method.own
    for task in range(3):
        expected = naive(columns[: len(columns) - 2 + task], x, layers=3)
        torch.testing.assert_close(method.policy(method.old_tasks + task)(x, TASK_IDS), expected)


@pytest.mark.parametrize("spec", [mlp_spec(8, 8, layer_norm=True), bronet_spec(8, 8)])
def test_only_the_new_column_learns_and_it_looks_sideways(spec: NetworkSpec) -> None:
    method = PNN(PNNConfig(lateral=4), spec)
    learn(method, 2, steps=3)
    learning = Learning(method, 2, steps=3)
    before = weights(learning.network)
    learning.finish()
    after = weights(learning.network)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("columns.2.")}
    for old in (0, 1):
        network = deepcopy(learning.network)
        got = outputs(network)
        with torch.no_grad():
            weight = network.get_parameter(f"columns.{old}.layers.0.theta")
            weight.add_(torch.randn_like(weight))
        assert not torch.equal(outputs(network), got)


def test_gradients_reach_the_input_through_all_columns() -> None:
    method = PNN(PNNConfig(lateral=4), mlp_spec(8))
    learn(method, 1, steps=1)
    network = method.begin(1)
    with torch.no_grad():
        network.get_parameter("columns.1.layers.0.theta").zero_()  # what is left comes sideways
    x = torch.randn(1, 4, IN, requires_grad=True)
    network(x, TASK_IDS).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_a_network_can_be_copied_after_a_pass() -> None:
    method = PNN(PNNConfig(lateral=4), mlp_spec(8))
    learn(method, 1, steps=1)
    network = method.begin(1)
    network(torch.randn(1, 4, IN), TASK_IDS)
    copy = deepcopy(network)
    assert torch.equal(outputs(copy), outputs(network))
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1.0)
    before = outputs(network)
    outputs(copy)
    assert torch.equal(outputs(network), before)


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    network = Columns(mlp_spec(8).stack, columns=2, width=4)
    expected = outputs(network)
    with pytest.raises(RuntimeError, match="shape"):
        network(torch.randn(1, 4, IN + 1), TASK_IDS)
    assert torch.equal(outputs(network), expected)


def test_bytes_by_hand() -> None:
    method = PNN(PNNConfig(lateral=4), mlp_spec(8, 8))
    plain = IN * 8 + 8 + 8 * 8 + 8 + 8 * OUT + OUT
    total = 0
    for earlier in range(3):
        learn(method, 1, steps=1)
        total += plain + earlier * (1 + 8 * 4) * 2  # scale and V of both adapters
        total += 4 * (8 + OUT) if earlier else 0  # U
        assert method.stored() == StorageCost(0, 4 * total)
