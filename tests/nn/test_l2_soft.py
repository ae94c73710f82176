"""The penalty: hand-worked, and the mean's part of VarShare's divergence."""

from __future__ import annotations

import pytest
import torch

from varshare_rl.nn import L2SoftConfig, L2SoftLayer, Posterior, VarShareLayer, VarShareLoRALayer
from varshare_rl.nn.layer import penalized_layers
from varshare_rl.nn.parameters import total_kl
from varshare_rl.nn.stochastic import drawn_layers
from varshare_rl.optim.elbo import Elbo, ElboConfig, KLNormalization, posterior_size


def test_penalty_by_hand() -> None:
    layer = L2SoftLayer(2, 1, 2, rank=None, prior_scale=0.5)
    with torch.no_grad():
        layer.residuals.copy_(torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]]))
    assert layer.kl().tolist() == [25 / 2 / 0.25, 1 / 2 / 0.25]
    low = L2SoftLayer(2, 1, 1, rank=1, alpha=7.0, prior_scale=2.0)
    with torch.no_grad():
        low.factors_A.copy_(torch.tensor([[[1.0, 2.0]]]))
        low.factors_B.copy_(torch.tensor([[[3.0]]]))
    assert low.kl().tolist() == [(1 + 4 + 9) / 2 / 4]


@pytest.mark.parametrize("rank", [None, 2])
def test_penalty_is_the_means_part_of_the_divergence(rank: int | None) -> None:
    ours = L2SoftLayer(5, 3, 4, rank=rank, prior_scale=0.3).double()
    theirs = VarShareLayer(5, 3, 4, 0.3) if rank is None else VarShareLoRALayer(5, 3, 4, rank, prior_scale=0.3)
    theirs = theirs.double()
    means = [name for name in theirs.per_task_parameters if name.startswith("mus")]
    with torch.no_grad():
        for name, own in zip(means, ours.per_task_parameters, strict=True):
            theirs.get_parameter(name).copy_(torch.randn_like(theirs.get_parameter(name)))
            ours.get_parameter(own).copy_(theirs.get_parameter(name))
        with_means = theirs.kl()
        for name in means:
            theirs.get_parameter(name).zero_()
        torch.testing.assert_close(ours.kl(), with_means - theirs.kl())


def test_it_is_penalised_but_not_stochastic() -> None:
    network = L2SoftConfig(hidden=[6]).build(4, 2, 3, Posterior())
    assert [name for name, _ in penalized_layers(network)] == ["layers.0", "layers.1"]
    assert not any(drawn_layers(network))


@pytest.mark.parametrize(("rank", "size"), [(2, 2 * (4 + 6) + 2 * (6 + 2)), (None, 4 * 6 + 6 * 2)])
def test_one_key_weights_it_like_varshare(rank: int | None, size: int) -> None:
    network = L2SoftConfig(hidden=[6], rank=rank).build(4, 2, 3, Posterior(prior_scale=0.5))
    with torch.no_grad():
        for layer in network.layers:
            layer.get_parameter(layer.per_task_parameters[0])[1] += 1.0
    assert posterior_size(network) == size
    nats = total_kl(network, 3)
    assert nats[1] > nats[0]
    for normalization, divisor in (("data", 500), ("parameters", size), ("none", 1)):
        elbo = Elbo(ElboConfig(kl_weight=0.2, normalization=KLNormalization[normalization]), 3)
        torch.testing.assert_close(elbo.penalty(network, 500), 0.2 * nats / divisor)
