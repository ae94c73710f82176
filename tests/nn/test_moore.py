"""Orthogonality of the experts, in the precision that training has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from varshare_rl.errors import UserError
from varshare_rl.nn import MOOREConfig, Posterior
from varshare_rl.nn.moore import orthonormalize


def gram(basis: Tensor) -> Tensor:
    """Inner products of the vectors of every row, ``[N, E, E]``."""
    return torch.einsum("enh,fnh->nef", basis, basis)


@pytest.mark.parametrize(("experts", "features"), [(2, 2), (4, 64), (6, 400), (6, 6)])
def test_experts_are_orthonormal_in_float32(experts: int, features: int) -> None:
    basis = orthonormalize(torch.randn(experts, 50, features))
    torch.testing.assert_close(gram(basis), torch.eye(experts).expand(50, -1, -1), rtol=0, atol=1e-5)


def test_experts_that_nearly_agree_become_orthonormal_too() -> None:
    """One pass of Gram-Schmidt in float32 would leave products of the order of 0.01 here."""
    alike = torch.randn(1, 50, 64) + 1e-5 * torch.randn(4, 50, 64)
    torch.testing.assert_close(gram(orthonormalize(alike)), torch.eye(4).expand(50, -1, -1), rtol=0, atol=1e-5)


def test_by_hand() -> None:
    basis = orthonormalize(torch.tensor([[[3.0, 0.0, 4.0]], [[0.0, 2.0, 0.0]], [[5.0, 7.0, 0.0]]]))
    expected = torch.tensor([[[0.6, 0.0, 0.8]], [[0.0, 1.0, 0.0]], [[0.8, 0.0, -0.6]]])
    torch.testing.assert_close(basis, expected)


def test_spans_stay_what_they_were() -> None:
    vectors = torch.randn(3, 20, 5, dtype=torch.float64)
    basis = orthonormalize(vectors)
    for count in (1, 2, 3):
        inside = torch.einsum("nh,enh->en", vectors[count - 1], basis[:count])
        rebuilt = torch.einsum("en,enh->nh", inside, basis[:count])
        torch.testing.assert_close(rebuilt, vectors[count - 1])


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(orthonormalize, torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True))


def test_the_network_mixes_orthonormal_experts() -> None:
    network = MOOREConfig(hidden=[32, 16], experts=4, activation="relu").build(5, 3, 2, Posterior())
    basis = orthonormalize(network.experts(torch.randn(100, 5)))
    torch.testing.assert_close(gram(basis), torch.eye(4).expand(100, -1, -1), rtol=0, atol=1e-5)


def test_more_experts_than_features_are_refused() -> None:
    with pytest.raises(UserError, match=r"network\.experts is 4; .* last hidden layer's 3 dimensions"):
        MOOREConfig(hidden=[8, 3]).build(5, 3, 2, Posterior())
    MOOREConfig(hidden=[2, 4]).build(5, 3, 2, Posterior())


@pytest.mark.parametrize("multi_head", [True, False])
def test_only_heads_that_are_asked_for(multi_head: bool) -> None:
    network = MOOREConfig(hidden=[8], multi_head=multi_head).build(5, 3, 6, Posterior())
    shape = network.head.weights.shape if multi_head else network.head.theta.shape
    assert tuple(shape) == ((6, 3, 8) if multi_head else (3, 8))
