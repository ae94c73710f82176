"""Everything against weights that are built in full, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from varshare_rl.ops.task_weights import (
    FullRankWeights,
    LowRankWeights,
    TaskWeights,
    cosines,
    disagreement,
    effective_rank,
    squared_distances,
)

TASKS = 4
SHAPES = [(7, 5, 2), (5, 7, 3), (1, 6, 3), (6, 1, 2), (3, 4, 8)]  # G, F, rank, which may exceed both


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def low_rank(rows: int, columns: int, rank: int) -> LowRankWeights:
    a, b = random(TASKS, rank, columns), random(TASKS, rows, rank)
    return LowRankWeights(random(rows, columns), a, b, 0.75, torch.rand_like(a), torch.rand_like(b))


def full_rank(rows: int, columns: int) -> FullRankWeights:
    mus = random(TASKS, rows, columns)
    return FullRankWeights(random(rows, columns), mus, torch.rand_like(mus))


def residuals(weights: TaskWeights) -> Tensor:
    """``R [T, G, F]``, built."""
    if isinstance(weights, LowRankWeights):
        return weights.scale * torch.stack([b @ a for a, b in zip(weights.mus_a, weights.mus_b, strict=True)])
    assert isinstance(weights, FullRankWeights)
    return weights.mus


CASES = [low_rank(*shape) for shape in SHAPES] + [full_rank(7, 5), full_rank(5, 7), full_rank(1, 6)]


@pytest.fixture(params=range(len(CASES)))
def weights(request: pytest.FixtureRequest) -> TaskWeights:
    return CASES[request.param]


def test_shape_and_products_are_those_of_the_built_residuals(weights: TaskWeights) -> None:
    built = residuals(weights)
    assert weights.theta is not None
    assert weights.shape == tuple(built.shape)
    gram = torch.tensor([[float((one * other).sum()) for other in built] for one in built], dtype=torch.float64)
    torch.testing.assert_close(weights.residual_gram(), gram)
    products = torch.stack([(weights.theta * residual).sum() for residual in built])
    torch.testing.assert_close(weights.theta_products(), products)


def test_singular_values_are_those_of_the_built_residuals(weights: TaskWeights) -> None:
    expected = torch.linalg.svdvals(residuals(weights))
    values = weights.singular_values().sort(-1, descending=True).values
    assert values.shape[1] <= expected.shape[1]
    torch.testing.assert_close(values, expected[:, : values.shape[1]], atol=1e-7, rtol=1e-7)
    assert float(expected[:, values.shape[1] :].abs().sum()) < 1e-10
    torch.testing.assert_close(effective_rank(values), effective_rank(expected), rtol=1e-5, atol=1e-6)


def test_the_variance_is_that_of_every_entry(weights: TaskWeights) -> None:
    if isinstance(weights, FullRankWeights):
        assert weights.sigmas is not None
        entries = weights.sigmas.square()
    else:
        assert isinstance(weights, LowRankWeights)
        assert weights.sigmas_a is not None
        assert weights.sigmas_b is not None
        a, b = weights.sigmas_a.square(), weights.sigmas_b.square()
        ma, mb = weights.mus_a.square(), weights.mus_b.square()
        entries = weights.scale**2 * (b @ a + mb @ a + b @ ma)
    torch.testing.assert_close(weights.mean_variance(), entries.mean((1, 2)))


def test_the_variance_is_that_of_draws() -> None:
    weights = low_rank(3, 4, 2)
    assert weights.sigmas_a is not None
    assert weights.sigmas_b is not None
    draws = 40_000
    a = weights.mus_a + weights.sigmas_a * random(draws, *weights.mus_a.shape)
    b = weights.mus_b + weights.sigmas_b * random(draws, *weights.mus_b.shape)
    sampled = (weights.scale * b @ a).var(0).mean((1, 2))
    torch.testing.assert_close(weights.mean_variance(), sampled, rtol=0.05, atol=0.0)


def test_without_a_posterior_there_is_no_variance() -> None:
    weights = low_rank(3, 4, 2)
    plain = LowRankWeights(weights.theta, weights.mus_a, weights.mus_b, weights.scale)
    assert plain.mean_variance() is None
    assert list(plain.posterior()) == ["mu_A", "mu_B"]
    assert list(weights.posterior()) == ["mu_A", "sigma_A", "mu_B", "sigma_B"]
    apart = FullRankWeights(None, random(TASKS, 3, 4))
    assert apart.mean_variance() is None
    assert list(apart.posterior()) == ["mu"]
    assert apart.theta_products().tolist() == [0.0] * TASKS


def test_effective_rank_by_hand() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0], [3.0, 1.0, 0.0]])
    two = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(values.double()).tolist() == pytest.approx([3.0, 1.0, 0.0, two])


def test_disagreement_and_distances_are_the_definitions() -> None:
    built = random(TASKS, 6, 5)
    gram = torch.einsum("tgf,sgf->ts", built, built)
    apart = (built - built.mean(0)).square().sum((1, 2)).mean()
    torch.testing.assert_close(disagreement(gram), apart)
    between = (built.unsqueeze(0) - built.unsqueeze(1)).square().sum((2, 3))
    torch.testing.assert_close(squared_distances(gram), between)


def test_cosines_by_hand() -> None:
    vectors = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    found = cosines(vectors @ vectors.t())
    half = math.sqrt(0.5)
    assert found[:3, :3].flatten().tolist() == pytest.approx([1, half, -1, half, 1, -half, -1, -half, 1])
    assert found[3].isnan().all()
    assert found[:, 3].isnan().all()
