"""The measures of layers and networks against weights that are built in full, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from naive import scramble, weight_of
from torch import Tensor, nn

from varshare_rl.nn import (
    IndependentConfig,
    IndependentLayer,
    Posterior,
    SharedConfig,
    VarShareConfig,
    VarShareLayer,
    VarShareLoRAConfig,
)
from varshare_rl.nn import VarShareLoRALayer as LoRALayer
from varshare_rl.nn.config import NetworkConfig
from varshare_rl.nn.parameters import total_kl
from varshare_rl.nn.sharing import Sharing, measure_sharing

TASKS = 4
NETWORKS: dict[str, NetworkConfig] = {
    "varshare_lora": VarShareLoRAConfig(hidden=[7, 6], rank=2, alpha=3.0),
    "varshare": VarShareConfig(hidden=[7, 6]),
    "independent": IndependentConfig(hidden=[7, 6]),
}


def scrambled(name: str) -> nn.ModuleDict:
    """Two networks, as an actor and a critic would be."""
    option = NETWORKS[name]
    made = {role: option.build(5, out, TASKS, Posterior()) for role, out in (("actor", 3), ("critic", 1))}  # type: ignore[attr-defined]
    modules = nn.ModuleDict(made).double().eval()
    scramble(modules)
    return modules


def measured(modules: nn.ModuleDict) -> Sharing:
    found = measure_sharing(dict(modules.items()))
    assert found is not None
    return found


def built_weights(modules: nn.ModuleDict) -> list[Tensor]:
    """``W [T, G, F]`` of every layer."""
    kinds = (LoRALayer, VarShareLayer, IndependentLayer)
    layers = [layer for layer in modules.modules() if isinstance(layer, kinds)]
    return [torch.stack([weight_of(layer, task)[0] for task in range(TASKS)]).detach() for layer in layers]


def thetas(modules: nn.ModuleDict) -> list[Tensor]:
    return [layer.theta.detach() for layer in modules.modules() if isinstance(layer, LoRALayer | VarShareLayer)]


@pytest.fixture(params=list(NETWORKS))
def modules(request: pytest.FixtureRequest) -> nn.ModuleDict:
    return scrambled(request.param)


def ratio(weights: Tensor) -> float:
    """``||mean W||^2 / mean ||W_i||^2`` of ``[T, N]``."""
    return float(weights.mean(0).square().sum() / weights.square().sum(1).mean())


def test_the_sharing_ratio_is_that_of_the_weights(modules: nn.ModuleDict) -> None:
    sharing, weights = measured(modules), built_weights(modules)
    assert [layer.name for layer in sharing.layers] == [
        *(f"actor.layers.{index}" for index in range(3)), *(f"critic.layers.{index}" for index in range(3)),
    ]  # fmt: skip
    for layer, built in zip(sharing.layers, weights, strict=True):
        assert (layer.rows, layer.columns) == tuple(built.shape[1:])
        assert layer.sharing == pytest.approx(ratio(built.flatten(1)))
        assert layer.mean_square == pytest.approx(float(built.square().sum((1, 2)).mean()))
    assert sharing.sharing == pytest.approx(ratio(torch.cat([built.flatten(1) for built in weights], 1)))


def test_distances_are_those_of_the_weights(modules: nn.ModuleDict) -> None:
    """The largest of any layer."""
    layers = []
    for built in built_weights(modules):
        vectors = built.flatten(1)
        layers.append(torch.cdist(vectors, vectors) / vectors.square().sum(1).mean().sqrt())
    expected = torch.stack(layers).amax(0)
    torch.testing.assert_close(measured(modules).distance(), expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", ["varshare_lora", "varshare"])
def test_residuals_are_those_of_the_weights(name: str) -> None:
    modules = scrambled(name)
    sharing = measured(modules)
    shared = thetas(modules)
    residuals = [built - theta for built, theta in zip(built_weights(modules), shared, strict=True)]
    for layer, residual, theta in zip(sharing.layers, residuals, shared, strict=True):
        torch.testing.assert_close(layer.residual_norm, residual.flatten(1).norm(dim=1))
        torch.testing.assert_close(layer.residual, residual.flatten(1).norm(dim=1) / theta.norm())
        share = torch.linalg.svdvals(residual)
        share = share / share.sum(1, keepdim=True)
        rank = torch.special.entr(share).sum(1).exp()
        torch.testing.assert_close(layer.effective_rank, rank, rtol=1e-5, atol=1e-5)
    vectors = torch.cat([residual.flatten(1) for residual in residuals], 1)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    torch.testing.assert_close(sharing.similarity(), unit @ unit.t())
    everything = torch.cat([theta.flatten() for theta in shared])
    torch.testing.assert_close(sharing.residual, vectors.norm(dim=1) / everything.norm())
    torch.testing.assert_close(sharing.nats, sum(total_kl(module, TASKS) for module in modules.values()))


@pytest.mark.parametrize("name", ["varshare_lora", "varshare"])
def test_sigma_is_that_of_draws(name: str) -> None:
    """Both of a layer and of all together: the deviation of the weights that a training pass would use."""
    modules = scrambled(name)
    sharing = measured(modules)
    draws: list[list[Tensor]] = []
    for layer in modules.modules():
        if isinstance(layer, VarShareLayer):
            noise = torch.randn(20_000, *layer.mus.shape, dtype=torch.float64)
            draws.append([noise * torch.nn.functional.softplus(layer.rhos)])
        elif isinstance(layer, LoRALayer):
            a, b = (
                mus + torch.nn.functional.softplus(rhos) * torch.randn(20_000, *mus.shape, dtype=torch.float64)
                for mus, rhos in ((layer.mus_A, layer.rhos_A), (layer.mus_B, layer.rhos_B))
            )
            draws.append([layer.scale * b @ a])
    variances = [draw[0].detach().var(0).flatten(1) for draw in draws]
    shared = thetas(modules)
    for layer, variance, theta in zip(sharing.layers, variances, shared, strict=True):
        torch.testing.assert_close(layer.sigma, variance.mean(1).sqrt(), rtol=0.03, atol=0.0)
        expected = variance.mean(1).sqrt() / theta.square().mean().sqrt()
        torch.testing.assert_close(layer.relative_sigma, expected, rtol=0.03, atol=0.0)
    mean = torch.cat(variances, 1).mean(1) / torch.cat([theta.flatten() for theta in shared]).square().mean()
    torch.testing.assert_close(sharing.relative_sigma, mean.sqrt(), rtol=0.03, atol=0.0)


def test_moving_a_common_part_changes_neither_sharing_nor_distance() -> None:
    modules = scrambled("varshare")
    before = measured(modules)
    with torch.no_grad():
        for layer in modules.modules():
            if isinstance(layer, VarShareLayer):
                common = layer.mus.mean(0)
                layer.theta += common
                layer.mus -= common
    after = measured(modules)
    assert after.sharing == pytest.approx(before.sharing)
    torch.testing.assert_close(after.distance(), before.distance())
    assert not torch.allclose(after.similarity(), before.similarity(), atol=0.1)


def test_a_fresh_network_shares_everything() -> None:
    sharing = measured(nn.ModuleDict({"actor": VarShareLoRAConfig(hidden=[7]).build(5, 3, TASKS, Posterior())}))
    assert sharing.sharing == 1.0
    assert float(sharing.distance().max()) == 0.0
    assert sharing.similarity().isnan().all()
    assert all(layer.effective_rank.tolist() == [0.0] * TASKS for layer in sharing.layers)
    assert all(layer.residual is not None and layer.residual.tolist() == [0.0] * TASKS for layer in sharing.layers)
    assert all(layer.sigma is not None and float(layer.sigma.min()) > 0 for layer in sharing.layers)


def test_independent_tasks_share_a_fraction_that_falls_with_their_number() -> None:
    tasks = 20
    sharing = measured(nn.ModuleDict({"actor": IndependentConfig(hidden=[64]).build(32, 8, tasks, Posterior())}))
    assert sharing.sharing == pytest.approx(1 / tasks, rel=0.1)
    assert (sharing.nats, sharing.residual, sharing.relative_sigma) == (None, None, None)
    off_diagonal = sharing.distance()[~torch.eye(tasks, dtype=torch.bool)]
    assert off_diagonal.mean().item() == pytest.approx(math.sqrt(2), rel=0.05)


def test_a_network_without_weights_per_task_has_no_measures() -> None:
    assert measure_sharing({"actor": SharedConfig(hidden=[7]).build(5, 3, TASKS, Posterior())}) is None


def test_small_differences_survive_float32() -> None:
    """Two tasks that differ by one part in a million of a large common residual."""
    layer = VarShareLayer(30, 30, 2)
    with torch.no_grad():
        layer.mus[:] = torch.randn(30, 30)
        layer.mus[1, 0, 0] += 1e-2
    built = (layer.theta + layer.mus).detach().double()
    expected = float((built[0] - built[1]).norm() / built.square().sum((1, 2)).mean().sqrt())
    found = measured(nn.ModuleDict({"actor": layer})).distance()
    assert found[0, 1].item() == pytest.approx(expected, rel=1e-3)


def test_histograms_count_every_parameter() -> None:
    modules = scrambled("varshare_lora")
    for layer in measured(modules).layers:
        assert list(layer.histograms) == ["mu_A", "sigma_A", "mu_B", "sigma_B"]
        assert sum(layer.histograms["mu_A"].counts) == TASKS * 2 * layer.columns
        assert sum(layer.histograms["sigma_B"].counts) == TASKS * 2 * layer.rows
    constant = measured(nn.ModuleDict({"actor": LoRALayer(5, 3, TASKS)})).layers[0].histograms["sigma_A"]
    assert constant.low < math.log1p(math.exp(-5.0)) < constant.high
    assert sum(constant.counts) == TASKS * 8 * 5
