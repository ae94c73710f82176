"""Copies, frozen, shared-private and replay: what the table in ``test_methods`` does not say of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import (
    IN,
    OUT,
    SAMPLES,
    TASK_IDS,
    Learning,
    bronet_spec,
    learn,
    make_pretrained,
    mlp_spec,
    outputs,
    task_data,
    weights,
)

from varshare_rl.errors import UserError
from varshare_rl.transfer.method import NetworkSpec, Pretrained, StorageCost
from varshare_rl.transfer.methods.copies import Copies, CopiesConfig, Start
from varshare_rl.transfer.methods.frozen import Frozen, FrozenConfig
from varshare_rl.transfer.methods.packnet import PackNet, PackNetConfig
from varshare_rl.transfer.methods.replay import ExperienceReplay, ExperienceReplayConfig
from varshare_rl.transfer.methods.shared_private import SharedPrivate, SharedPrivateConfig
from varshare_rl.transfer.pretrained import pretrained_policy

NETWORK = 4 * (IN * 16 + 16 + 16 * OUT + OUT)  # bytes of mlp_spec(16)
HEAD = 4 * (16 * OUT + OUT)


def test_where_copies_start() -> None:
    spec = mlp_spec(16)
    for start in Start:
        method = Copies(CopiesConfig(start=start), spec)
        first = Learning(method, 0, steps=3)
        initial = outputs(first.network)
        first.finish()
        learn(method, 1, steps=3)
        begun = outputs(method.begin(2))
        assert torch.equal(begun, outputs(method.policy(1))) == (start is Start.previous)
        assert torch.equal(begun, initial) == (start is Start.base)
        assert method.stored() == StorageCost(0, 2 * NETWORK, NETWORK if start is Start.base else 0)


def test_where_copies_start_from_a_pretrained_agent() -> None:
    spec = mlp_spec(16)
    pretrained = make_pretrained(spec)
    base = spec.plain()
    base.load_state_dict(dict(pretrained.base))
    for start, expected in ((Start.previous, pretrained_policy(spec, pretrained, 1)), (Start.base, base)):
        method = Copies(CopiesConfig(start=start), spec, pretrained)
        assert torch.equal(outputs(method.begin(2)), outputs(expected))
        # factors of rank 2: 3 -> 16 of both tasks, 16 -> 2 of the first
        assert method.stored() == StorageCost(NETWORK, 4 * (2 * 2 * (3 + 16) + 2 * (16 + 2)))
        assert all(parameter.requires_grad for parameter in method.begin(2).parameters())


def test_unknown_tasks_of_a_pretrained_agent_are_named() -> None:
    spec = mlp_spec(16)
    with pytest.raises(IndexError, match="unknown task id 2"):
        pretrained_policy(spec, make_pretrained(spec), 2)


@pytest.mark.parametrize("pretrained", [None, 0, 2])
def test_frozen_has_nothing_to_train_after_the_first_task(pretrained: int | None) -> None:
    spec = mlp_spec(16)
    method = Frozen(FrozenConfig(), spec, None if pretrained is None else make_pretrained(spec, tasks=pretrained))
    trained = []
    for _ in range(2):
        network = method.begin(method.tasks)
        trained.append(any(parameter.requires_grad for parameter in network.parameters()))
        learn(method, 1, steps=1)
    assert trained == [pretrained is None, False]
    assert method.stored() == StorageCost(NETWORK, 0)


@pytest.mark.parametrize("spec", [mlp_spec(16, 16, layer_norm=True), bronet_spec(16, 16)])
@pytest.mark.parametrize("pretrained", [False, True])
def test_shared_private_trains_heads_alone_once_there_is_an_encoder(spec: NetworkSpec, pretrained: bool) -> None:
    method = SharedPrivate(SharedPrivateConfig(), spec, make_pretrained(spec) if pretrained else None)
    networks = []
    for _ in range(3):
        learning = Learning(method, method.tasks, steps=3)
        before = weights(learning.network)
        learning.finish()
        after = weights(learning.network)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        everything = not networks and not pretrained
        assert changed == {name for name in before if everything or name.startswith(method.head)}
        networks.append(before)
    heads = [network[f"{method.head}.theta"] for network in networks]
    assert not torch.equal(heads[1], heads[2])  # each starts afresh


def test_shared_private_bytes() -> None:
    spec = mlp_spec(16)
    for pretrained in (None, make_pretrained(spec, tasks=0)):
        method = SharedPrivate(SharedPrivateConfig(), spec, pretrained)
        learn(method, 3, steps=1)
        assert method.stored() == StorageCost(NETWORK - HEAD, 3 * HEAD)
    method = SharedPrivate(SharedPrivateConfig(), spec, make_pretrained(spec))
    learn(method, 1, steps=1)
    assert method.stored().shared == NETWORK  # the pretrained agent's tasks need the base's head


@pytest.mark.parametrize(
    "build", [lambda s: SharedPrivate(SharedPrivateConfig(), s), lambda s: PackNet(PackNetConfig(), s)]
)
def test_methods_with_heads_need_a_hidden_layer(build: type) -> None:
    with pytest.raises(UserError, match="give it a hidden layer"):
        build(mlp_spec())
    with pytest.raises(UserError, match="a Linear has no last layer of its own"):
        build(NetworkSpec(IN, OUT, lambda layer: torch.nn.Linear(IN, OUT), mlp_spec().likelihood))


def test_replay_penalty_by_hand() -> None:
    method = ExperienceReplay(ExperienceReplayConfig(weight=3.0, samples_per_task=1, batch=4), mlp_spec(16))
    first = Learning(method, 0, steps=3)
    first.finish()
    network = method.begin(1)
    penalty = method.penalty(network, SAMPLES)
    assert isinstance(penalty, Tensor)
    assert penalty.shape == (1,)
    torch.testing.assert_close(penalty, torch.zeros(1), atol=1e-9, rtol=0.0)  # nothing has changed yet
    with torch.no_grad():
        network.get_parameter("layers.1.bias").add_(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(method.penalty(network, SAMPLES), torch.tensor([3.0 * 0.5 * 5.0]))


def test_replay_keeps_what_the_network_did_at_each_tasks_end() -> None:
    method = ExperienceReplay(ExperienceReplayConfig(samples_per_task=10), mlp_spec(16))
    ends = []
    for task in range(2):
        learning = Learning(method, task, steps=20)
        learning.finish()
        ends.append(learning.network)
    assert method.inputs.shape == (1, 20, IN)
    for task, network in enumerate(ends):
        part = slice(10 * task, 10 * task + 10)
        inputs = method.inputs[:, part]
        torch.testing.assert_close(method.outputs[:, part], network(inputs, TASK_IDS).detach())
        rows = {tuple(row) for row in task_data(task)[0][0].tolist()}
        assert len({tuple(row) for row in inputs[0].tolist()} & rows) == 10  # different ones of this task
    assert method.stored() == StorageCost(NETWORK, 0, 4 * 20 * (IN + OUT))


def test_replay_takes_fewer_samples_where_there_are_no_more() -> None:
    method = ExperienceReplay(ExperienceReplayConfig(samples_per_task=1000), mlp_spec(16))
    learn(method, 1, steps=1)
    assert method.inputs.shape[1] == SAMPLES


def test_replay_draws_from_all_earlier_tasks() -> None:
    method = ExperienceReplay(ExperienceReplayConfig(samples_per_task=8, batch=512), mlp_spec(16))
    learn(method, 3, steps=1)
    seen: list[Tensor] = []
    network = method.begin(3)
    network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    method.penalty(network, SAMPLES)
    drawn = {tuple(row) for row in seen[0][0].tolist()}
    assert drawn == {tuple(row) for row in method.inputs[0].tolist()}


def test_methods_without_the_samples_of_old_tasks_start_from_its_base() -> None:
    spec = mlp_spec(16)
    pretrained: Pretrained = make_pretrained(spec)
    method = ExperienceReplay(ExperienceReplayConfig(), spec, pretrained)
    network = method.begin(2)
    assert torch.equal(network.get_parameter("layers.0.theta"), pretrained.base["layers.0.theta"])
    assert method.penalty(network, SAMPLES) == 0.0
