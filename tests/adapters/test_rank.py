"""Ranks by singular values and by posteriors, and the dimension of random subspaces that suffices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from varshare_rl.adapters import LowRank, apply_lora
from varshare_rl.adapters.intrinsic import RandomSubspace, intrinsic_dimension
from varshare_rl.adapters.rank import needed_ranks, posterior_ranks, truncated
from varshare_rl.errors import UserError
from varshare_rl.nn import Posterior, VarShareLoRAConfig
from varshare_rl.nn.varshare_lora import VarShareLoRALayer


def with_values(*singular: float) -> LowRank:
    """A correction with these singular values, in factors of another gauge."""
    size = len(singular)
    u, v = (torch.linalg.qr(torch.randn(rows, size, dtype=torch.float64))[0] for rows in (9, 7))
    gauge = torch.randn(size, size, dtype=torch.float64)
    return LowRank(torch.linalg.inv(gauge) @ (u.new_tensor(singular)[:, None] * v.T), 0.5 * u @ gauge, 2.0)


@pytest.mark.parametrize(("max_error", "rank"), [(0.0, 3), (0.09, 3), (0.11, 2), (0.31, 2), (0.33, 1), (0.9, 1)])
def test_ranks_by_hand(max_error: float, rank: int) -> None:
    # squares 90, 9, 1: without the last 0.1 of the norm, without two 0.3162
    adapter = {"x": with_values(90**0.5, 3.0, 1.0)}
    assert needed_ranks(adapter, max_error) == {"x": rank}
    cut = truncated(adapter, max_error)["x"]
    assert (cut.rank, cut.scale, cut.a.dtype) == (rank, 1.0, torch.float32)
    error = float((cut.delta() - adapter["x"].delta()).norm() / adapter["x"].delta().norm())
    assert error == pytest.approx({3: 0.0, 2: 0.1, 1: 10**-0.5}[rank], abs=1e-6)


def test_a_correction_of_nothing_has_rank_one_and_no_error_is_refused() -> None:
    adapter = {"x": LowRank(torch.randn(3, 4), torch.zeros(5, 3))}
    assert needed_ranks(adapter) == {"x": 1}
    with pytest.raises(ValueError, match="max_error is 1"):
        needed_ranks(adapter, 1.0)


def test_ranks_by_the_posterior() -> None:
    network = VarShareLoRAConfig(hidden=[5], rank=3).build(4, 2, 2, Posterior())
    layers = [module for module in network.modules() if isinstance(module, VarShareLoRALayer)]
    with torch.no_grad():
        for layer in layers:
            layer.set_to_prior(torch.zeros(2, 3, dtype=torch.bool))
        layers[0].mus_B[1, :, 0] = 2.0
        layers[0].mus_A[1, 2] = -1.0
    assert posterior_ranks(network, 1) == {"0": 2, "2": 0}
    assert posterior_ranks(network, 0) == {"0": 0, "2": 0}
    with pytest.raises(IndexError, match="unknown task id 2"):
        posterior_ranks(network, 2)


def fit(model: nn.Module) -> float:
    """Score of a linear fit whose inputs span three dimensions: 1 minus the error that is left."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    y = x @ torch.randn(12, 1, generator=generator)
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean() / y.square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return 1.0 - float(closure().detach())


def test_a_problem_of_three_dimensions_takes_three() -> None:
    model = nn.Linear(12, 1, bias=False)
    found = intrinsic_dimension(model, fit, [5, 1, 3, 2], fraction=0.99)
    assert found.dimension == 3
    assert list(found.scores) == [1, 2, 3]
    assert found.full == pytest.approx(1.0, abs=1e-3)
    assert intrinsic_dimension(model, fit, [1, 2], fraction=0.99).dimension is None


def test_a_subspace_begins_at_the_model_and_trains_its_own_numbers_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    lora = apply_lora(model, ["0"])
    lora.add("task", rank=2)
    lora.activate("task")
    subspace = RandomSubspace(model, 3, seed=4)
    x = torch.randn(6, 4)
    assert torch.equal(subspace(x), model(x))
    assert [name for name, value in subspace.named_parameters() if value.requires_grad] == ["z"]
    assert subspace.projection.shape == (2 * (4 + 5), 3)
    torch.testing.assert_close(subspace.projection.norm(dim=0), torch.ones(3))
    with torch.no_grad():
        subspace.z.fill_(1.0)
    assert not torch.allclose(subspace(x), model(x))
    with pytest.raises(UserError, match="dimension is 19; the model has 18"):
        RandomSubspace(model, 19)
