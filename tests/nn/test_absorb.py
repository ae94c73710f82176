"""Absorption against weights built in full in float64, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from naive import scramble, weight_of
from torch import Tensor, nn

from varshare_rl.nn import VarShareLayer, VarShareLoRALayer
from varshare_rl.nn.absorb import absorb

TASKS = 5


def low_rank(common: float, outputs: int = 9, inputs: int = 12, rank: int = 3) -> VarShareLoRALayer:
    """Factors that are ``common`` shared and the rest of each task's own, far from balanced."""
    layer = VarShareLoRALayer(inputs, outputs, TASKS, rank=rank, alpha=1.5 * rank).double()
    with torch.no_grad():
        for mus, size in ((layer.mus_A, 0.3), (layer.mus_B, 2.0)):
            own = torch.randn_like(mus)
            mus.copy_(size * (common * torch.randn_like(mus[:1]) + (1 - common) * own))
    return layer


def weights(layer: nn.Module) -> Tensor:
    return torch.stack([weight_of(layer.eval(), task)[0] for task in range(TASKS)]).detach()


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def test_full_rank_moves_the_mean_and_keeps_every_weight() -> None:
    layer = VarShareLayer(4, 3, TASKS).double()
    scramble(layer)
    before, theta, mus, rhos = weights(layer), layer.theta.clone(), layer.mus.clone(), layer.rhos.clone()
    done = absorb(layer, 0.25, max_error=0.0)[""]
    assert done.done
    assert done.error.tolist() == [0.0] * TASKS
    torch.testing.assert_close(layer.theta, theta + 0.25 * mus.mean(0))
    torch.testing.assert_close(layer.mus, mus - 0.25 * mus.mean(0))
    torch.testing.assert_close(weights(layer), before, rtol=0, atol=1e-14)
    assert torch.equal(layer.rhos, rhos)


@pytest.mark.parametrize("rate", [0.1, 1.0])
@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(9, 12, 3), (1, 12, 3), (9, 2, 3), (30, 40, 2)])
def test_low_rank_is_the_best_approximation_built_in_full(
    rate: float, outputs: int, inputs: int, rank: int
) -> None:
    layer = low_rank(0.7, outputs, inputs, rank)
    theta, before = layer.theta.detach().clone(), weights(layer)
    residuals = before - theta
    u, s, vh = torch.linalg.svd(residuals.mean(0), full_matrices=False)
    step = rate * (u[:, :rank] * s[:rank]) @ vh[:rank]
    wanted, errors = [], []
    for residual in residuals:
        u, s, vh = torch.linalg.svd(residual - step, full_matrices=False)
        wanted.append((u[:, :rank] * s[:rank]) @ vh[:rank])
        errors.append(s[rank:].norm() / max(residual.norm(), s.norm()))
    done = absorb(layer, rate, max_error=9.0)[""]
    assert done.done
    torch.testing.assert_close(layer.theta, theta + step)
    torch.testing.assert_close(weights(layer) - layer.theta, torch.stack(wanted))
    torch.testing.assert_close(done.error, torch.stack(errors), rtol=1e-6, atol=1e-10)
    assert done.share == pytest.approx(float(step.norm() / theta.norm()))
    change = (weights(layer) - before).norm(dim=(1, 2)) / residuals.norm(dim=(1, 2))
    assert (change <= done.error * 1.5 + 1e-10).all()


def test_new_factors_are_balanced_near_the_old_ones_and_cheaper() -> None:
    layer = low_rank(0.7)
    sigmas = (layer.rhos_A.clone(), layer.rhos_B.clone())
    kl = layer.kl()
    saving = absorb(layer, 0.5, max_error=9.0)[""].saving
    torch.testing.assert_close(layer.mus_B.mT @ layer.mus_B, layer.mus_A @ layer.mus_A.mT)
    assert torch.equal(layer.rhos_A, sigmas[0])
    assert torch.equal(layer.rhos_B, sigmas[1])
    assert saving > 0
    assert layer.kl().sum() < kl.sum()
    # from balanced factors a small step is a small change: components keep their places
    a, b = layer.mus_A.clone(), layer.mus_B.clone()
    absorb(layer, 1e-4, max_error=9.0)
    for new, old in ((layer.mus_A, a), (layer.mus_B, b)):
        assert 0 < (new - old).norm() / old.norm() < 1e-3


def test_what_all_tasks_share_is_absorbed_whole_and_the_factors_start_afresh() -> None:
    layer = low_rank(1.0)
    before = weights(layer)
    done = absorb(layer, 1.0, max_error=1e-6)[""]
    assert done.done
    assert done.saving == pytest.approx(1.0)
    torch.testing.assert_close(weights(layer), before)
    torch.testing.assert_close(layer.theta.expand_as(before), before)
    assert layer.mus_B.abs().max() < 1e-6
    assert (layer.mus_A.norm(dim=2) > 0.01).all()  # or no gradient would reach B
    assert torch.linalg.matrix_rank(layer.mus_A).tolist() == [3] * TASKS


def test_a_layer_is_left_alone_to_the_bit() -> None:
    unlike, opposed, frozen, fresh = (
        low_rank(0.0),
        low_rank(0.0, 1, 3, 1),
        low_rank(0.9),
        VarShareLoRALayer(4, 3, 2),
    )
    with torch.no_grad():  # one large residual beside small ones: without the mean all of them have its size
        opposed.mus_A.copy_(
            torch.eye(3)[[0, 1, 1, 1, 1]].unsqueeze(1) * torch.tensor([9.0, 1, 1, 1, 1]).view(-1, 1, 1)
        )
        opposed.mus_B.fill_(1.0)
        opposed.mus_A[1:] *= torch.tensor([1.0, -1, 1, -1]).view(-1, 1, 1)
    frozen.theta.requires_grad_(False)
    for layer, bound in ((unlike, 0.01), (opposed, 9.0), (frozen, 9.0), (fresh, 9.0)):
        before = state(layer)
        done = absorb(layer, 1.0, max_error=bound)
        assert not any(absorption.done for absorption in done.values())
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert absorb(unlike, 1.0, max_error=0.01)[""].error.max() > 0.01
    assert absorb(opposed, 1.0, max_error=9.0)[""].saving < 0
    assert absorb(frozen, 1.0, max_error=9.0) == {}


def test_a_follower_absorbs_where_its_leader_does() -> None:
    leader, target_module = (nn.ModuleDict({"a": low_rank(0.8), "b": low_rank(0.0)}) for _ in range(2))
    target_module.load_state_dict(leader.state_dict())
    with torch.no_grad():
        for value in target_module.parameters():
            value.add_(1e-3 * torch.randn_like(value))
    target_module.requires_grad_(False)
    apart = {name: weights(target_module[name]) for name in "ab"}
    gap = {name: (leader[name].mus_A - target_module[name].mus_A).norm() for name in "ab"}
    untouched = state(target_module["b"])
    bound = float(absorb_errors(leader["b"]).max()) * 0.9
    done = absorb(leader, 1.0, bound, target_module)
    assert [done[name].done for name in "ab"] == [True, False]
    assert all(torch.equal(value, untouched[name]) for name, value in target_module["b"].state_dict().items())
    shift = (weights(target_module["a"]) - apart["a"]).norm() / apart["a"].norm()
    assert shift < 2 * bound
    assert (leader["a"].mus_A - target_module["a"].mus_A).norm() < 5 * gap["a"]  # factors still correspond


def absorb_errors(layer: nn.Module) -> Tensor:
    return absorb(layer, 1.0, max_error=0.0)[""].error


@pytest.mark.parametrize(("rate", "bound"), [(0.0, 1.0), (1.1, 1.0), (0.5, -1.0), (float("nan"), 1.0)])
def test_impossible_numbers(rate: float, bound: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        absorb(low_rank(0.5), rate, bound)
