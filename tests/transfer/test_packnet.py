from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import IN, OUT, Learning, learn, make_pretrained, mlp_spec, outputs, weights

from varshare_rl.nn.shared import SharedLayer
from varshare_rl.transfer.method import StorageCost
from varshare_rl.transfer.methods.packnet import FREE, PackNet, PackNetConfig, packed_layers


def build(**options: float) -> PackNet:
    return PackNet(PackNetConfig(**options), mlp_spec(16, 16, layer_norm=True))  # type: ignore[arg-type]


def test_shares_by_hand() -> None:
    method = build(share_per_task=0.25)
    learn(method, 3, steps=2)
    assert list(method.owners) == ["layers.0", "layers.1"]
    # 48 weights: 12 of 48, 9 of 36, 7 of 27 (6.75); 256: 64 of 256, 48 of 192, 36 of 144
    for path, counts in {"layers.0": [12, 9, 7, 20], "layers.1": [64, 48, 36, 108]}.items():
        owner = method.owners[path]
        assert [int((owner == task).sum()) for task in (0, 1, 2, FREE)] == counts


def test_the_smallest_are_given_up_at_their_time_and_stay_at_zero() -> None:
    method = build(share_per_task=0.5, prune_at=0.5)
    learning = Learning(method, 0, steps=10)
    learning.run(4)
    before = dict(packed_layers(learning.network))
    assert not any(bool(layer.pruned) for layer in before.values())
    learning.run(1)
    after = weights(learning.network)
    learning.run(5)
    for path, layer in packed_layers(learning.network):
        kept = after[f"{path}.trained"]
        assert int(kept.sum()) == kept.numel() // 2
        assert torch.equal(layer.trained, kept)
        weight = layer.weight().detach()
        assert (weight[~kept] == 0).all()
        assert (weight[kept] != after[f"{path}.theta"][kept]).all()  # and the others learn on
    learning.finish()
    for path, owner in method.owners.items():
        assert torch.equal(owner == 0, after[f"{path}.trained"])


def test_only_free_weights_count_as_trained() -> None:
    method = build(share_per_task=0.25)
    head, norms_and_biases = 16 * OUT + OUT, 2 * 3 * 16
    weights_of_body = 3 * 16 + 16 * 16
    assert method.trained_parameters(method.begin(0)) == weights_of_body + norms_and_biases + head
    learn(method, 1, steps=2)
    assert method.trained_parameters(method.begin(1)) == 36 + 192 + head  # of 48 and 256


def test_magnitude_decides() -> None:
    method = build(share_per_task=0.25)
    network = method.begin(0)
    sizes = {path: layer.theta.detach().abs().clone() for path, layer in packed_layers(network)}
    method.advance(network, 0.5)
    for path, layer in packed_layers(network):
        assert sizes[path][layer.trained].min() > sizes[path][~layer.trained].max()


def test_no_optimiser_moves_what_is_not_trained() -> None:
    method = build()
    learn(method, 2, steps=4)
    policies = [outputs(method.policy(task)) for task in range(2)]
    network = method.begin(2)
    with torch.no_grad():
        for layer in (layer for _, layer in packed_layers(network)):
            layer.theta.copy_(torch.where(layer.trained, layer.theta, torch.nan))  # whatever decay and moments do
    assert outputs(network).isfinite().all()
    method.end(network, torch.randn(1, 4, IN))
    for task, before in enumerate(policies):
        assert torch.equal(outputs(method.policy(task)), before)


def test_free_weights_start_at_zero_and_biases_and_norms_are_the_first_tasks() -> None:
    method = build()
    first = Learning(method, 0, steps=4)
    first.finish()
    network = method.begin(1)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {"layers.0.theta", "layers.1.theta", "layers.2.theta", "layers.2.bias"}
    for path, layer in packed_layers(network):
        assert (layer.weight()[layer.trained] == 0).all()
        assert torch.equal(layer.bias, first.network.get_parameter(f"{path}.bias"))
    assert not torch.equal(network.get_parameter("norms.0.weight"), torch.ones(16))


def test_a_task_that_is_cut_short_prunes_at_its_end() -> None:
    method = build(share_per_task=0.25, prune_at=1.0)
    network = method.begin(0)
    method.end(network, torch.randn(1, 4, IN))
    assert int((method.owners["layers.1"] == 0).sum()) == 64


def test_when_nothing_is_free_the_head_still_learns() -> None:
    method = build(share_per_task=1.0)
    learn(method, 1, steps=2)
    learning = Learning(method, 1, steps=4)
    before = weights(learning.network)
    learning.finish()
    after = weights(learning.network)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed >= {"layers.2.theta", "layers.2.bias"}
    assert not any(bool((owner == 1).any()) for owner in method.owners.values())


@pytest.mark.parametrize(("tasks", "bits"), [(1, 1), (2, 2), (3, 2), (4, 3)])
def test_bytes_by_hand(tasks: int, bits: int) -> None:
    method = build()
    learn(method, tasks, steps=1)
    body = 4 * (IN * 16 + 16 + 16 * 16 + 16 + 2 * 32)
    owners = (IN * 16 + 16 * 16) * bits // 8
    assert method.stored() == StorageCost(body, tasks * 4 * (16 * OUT + OUT) + owners)


def test_a_pretrained_base_is_kept_apart() -> None:
    spec = mlp_spec(16)
    pretrained = make_pretrained(spec)
    method = PackNet(PackNetConfig(), spec, pretrained)
    network = method.begin(2)
    ((path, layer),) = packed_layers(network)
    assert torch.equal(layer.weight(), pretrained.base[f"{path}.theta"])
    assert layer.trained.all()
    base = sum(value.numel() for value in pretrained.base.values())
    adapters = sum(
        factor.a.numel() + factor.b.numel() for adapter in pretrained.adapters for factor in adapter.values()
    )
    assert method.stored() == StorageCost(4 * base + 4 * (IN * 16 + 16), 4 * adapters)


def test_policies_are_plain_networks() -> None:
    method = build()
    learn(method, 1, steps=1)
    layers = method.policy(0).get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    assert all(type(layer) is SharedLayer for layer in layers)
