"""Pruning: what the measures are, what a pruned unit becomes, and what is counted."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from naive import scramble
from torch.distributions import Normal, kl_divergence

from varshare_rl.nn import VarShareLayer, VarShareLoRALayer
from varshare_rl.nn.prune import Criterion, prune, report

PRIOR = 0.8
AT_PRIOR = math.log(math.expm1(PRIOR))


def low_rank() -> VarShareLoRALayer:
    layer = VarShareLoRALayer(5, 4, 3, rank=2, alpha=3.0, prior_scale=PRIOR).double()
    scramble(layer)
    return layer


def full_rank() -> VarShareLayer:
    layer = VarShareLayer(5, 4, 3, prior_scale=PRIOR).double()
    scramble(layer)
    return layer


def test_nats_are_those_of_torch_distributions() -> None:
    prior = Normal(torch.zeros((), dtype=torch.float64), PRIOR)
    layer = low_rank()
    for task in range(3):
        for k in range(2):
            mus = torch.cat([layer.mus_A[task, k], layer.mus_B[task, :, k]])
            rhos = torch.cat([layer.rhos_A[task, k], layer.rhos_B[task, :, k]])
            expected = kl_divergence(Normal(mus, F.softplus(rhos)), prior).mean()
            torch.testing.assert_close(layer.unit_nats()[task, k], expected)
    full = full_rank()
    expected = kl_divergence(Normal(full.mus, F.softplus(full.rhos)), prior).mean((1, 2))
    torch.testing.assert_close(full.unit_nats(), expected)
    torch.testing.assert_close(full.unit_nats(), full.kl() / 20)


def test_signal_to_noise_of_a_component_is_that_of_drawn_products() -> None:
    layer, draws = low_rank(), 40_000
    with torch.no_grad():
        row = layer.mus_A[1, 0] + F.softplus(layer.rhos_A[1, 0]) * torch.randn(draws, 5, dtype=torch.float64)
        column = layer.mus_B[1, :, 0] + F.softplus(layer.rhos_B[1, :, 0]) * torch.randn(
            draws, 4, dtype=torch.float64
        )
        products = column.unsqueeze(2) * row.unsqueeze(1)
        expected = products.mean(0).norm() / products.var(0).sum().sqrt()
    torch.testing.assert_close(layer.unit_snr()[1, 0], expected, rtol=0.02, atol=0)
    full = full_rank()
    torch.testing.assert_close(full.unit_snr(), full.mus.abs() / F.softplus(full.rhos))


def test_components_at_the_prior_go_and_others_stay() -> None:
    layer = low_rank()
    with torch.no_grad():
        layer.mus_A[1, 0], layer.mus_B[1, :, 0] = 1e-4, -1e-4
        layer.rhos_A[1, 0], layer.rhos_B[1, :, 0] = AT_PRIOR + 1e-4, AT_PRIOR
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    kl, x = layer.kl(), torch.randn(3, 6, 5, dtype=torch.float64)
    output = layer.eval()(x, torch.arange(3))
    done = prune(layer, 1e-6)[""]
    assert done.kept.tolist() == [[True, True], [False, True], [True, True]]
    for name in ("A", "B"):
        mus, rhos = (layer.get_parameter(f"{kind}_{name}") for kind in ("mus", "rhos"))
        old_mus, old_rhos = before[f"mus_{name}"], before[f"rhos_{name}"]
        unit = (1, 0) if name == "A" else (1, slice(None), 0)
        assert (mus[unit] == 0).all()
        torch.testing.assert_close(F.softplus(rhos[unit]), torch.full_like(rhos[unit], PRIOR))
        old_mus[unit], old_rhos[unit] = mus[unit].detach(), rhos[unit].detach()
        assert torch.equal(mus, old_mus)  # nothing else moved
        assert torch.equal(rhos, old_rhos)
    torch.testing.assert_close(done.nats_before, kl.detach())
    assert done.nats_after[1] < kl[1]
    assert torch.equal(done.nats_after[[0, 2]], kl.detach()[[0, 2]])
    change = layer(x, torch.arange(3)) - output
    assert torch.equal(change[[0, 2]], torch.zeros_like(change[[0, 2]]))
    assert 0 < change[1].abs().max() < 1e-6
    assert done.change[0] == 0
    assert 0 < done.change[1] < 1e-6


def test_counts_and_bytes_by_hand() -> None:
    layer = low_rank()
    with torch.no_grad():
        for parameter, value in (
            (layer.mus_A, 0.0),
            (layer.mus_B, 0.0),
            (layer.rhos_A, AT_PRIOR),
            (layer.rhos_B, AT_PRIOR),
        ):
            parameter[0] = value
    told = report({"layer": prune(layer, 0.001)[""]})
    assert (told["units"], told["kept"]) == (6, 4)
    assert told["bytes_dense"] == 3 * 2 * (5 + 4) * 8
    assert told["bytes_kept"] == 4 * (5 + 4) * 8 + 1  # and one bit for each of six units
    layers = told["layers"]
    assert isinstance(layers, dict)
    assert layers["layer"]["kept_per_task"] == [0, 2, 2]
    assert layers["layer"]["nats_after"][0] == pytest.approx(0.0, abs=1e-9)


def test_full_rank_goes_by_task_or_by_weight() -> None:
    layer = full_rank()
    with torch.no_grad():
        layer.mus[2], layer.rhos[2] = 0.0, AT_PRIOR
    assert prune(layer, 1e-6)[""].kept.tolist() == [True, True, False]
    by_weight = full_rank()
    expected = (by_weight.mus.abs() / F.softplus(by_weight.rhos)) >= 1.0
    done = prune(by_weight, 1.0, Criterion.snr)[""]
    assert torch.equal(done.kept, expected)
    assert 0 < int(expected.sum()) < expected.numel()
    assert torch.equal(by_weight.mus != 0, expected)
    assert done.kept_bytes == int(expected.sum()) * 8 + 60 // 8 + 1


def test_thresholds_at_the_ends() -> None:
    layer = low_rank()
    assert prune(layer, 0.0)[""].kept.all()
    everything = prune(layer, 1e9)[""]
    assert not everything.kept.any()
    torch.testing.assert_close(layer.kl(), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="at least 0"):
        prune(layer, -1.0)
