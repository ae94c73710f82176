"""The layers' matrix products on every path: both backends, no bias, some gradients only, no rows."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varshare_rl.ops import linear as kernels
from varshare_rl.ops.linear import full_rank_linear, linear, low_rank_linear

#: Blocks, rows, inputs, outputs, rank: small, and large enough for the path that is made for training.
SIZES = {"small": (3, 4, 5, 6, 2), "large": (4, 40, 80, 96, 8), "many_rows": (4, 100, 24, 20, 2)}


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute a product, whichever this machine would choose."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(kernels, "_ONEDNN", request.param)


def inputs(size: str) -> list[Tensor]:
    """x, weight, a, b and bias."""
    blocks, rows, fan_in, fan_out, rank = SIZES[size]
    shapes = [
        (blocks, rows, fan_in),
        (fan_out, fan_in),
        (blocks, rank, fan_in),
        (blocks, fan_out, rank),
        (fan_out,),
    ]
    return [torch.randn(shape) for shape in shapes]


def ours(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return low_rank_linear(x, weight, bias, a, b, 0.7)


def naive(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Every block with its weight built in full."""
    return torch.stack([F.linear(x[k], weight + 0.7 * b[k] @ a[k], bias) for k in range(len(x))])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("functions", [(ours, naive), (linear, F.linear)], ids=["low_rank", "linear"])
@pytest.mark.usefixtures("_backend")
def test_values_and_gradients(size: str, bias: bool, functions: tuple) -> None:  # type: ignore[type-arg]
    given = inputs(size) if functions[0] is ours else [inputs(size)[i] for i in (0, 1, 4)]
    results = []
    for function, dtype in zip(functions, (torch.float32, torch.float64), strict=True):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (given if bias else given[:-1])]
        y = function(*leaves)
        slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, slope)])
    for index, (mine, exact) in enumerate(zip(*results, strict=True)):
        assert mine.dtype == torch.float32
        assert float((mine.double() - exact).norm() / exact.norm()) < 2e-6, index


def full_rank(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    return full_rank_linear(x, weight, bias, residual)


def naive_full_rank(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.stack([F.linear(x[k], weight + residual[k], bias) for k in range(len(x))])


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("_backend")
def test_residuals_of_full_rank(rows: int, bias: bool) -> None:
    shapes = [(3, rows, 24), (20, 24), (3, 20, 24), *([(20,)] if bias else [])]
    given = [torch.randn(shape).double() for shape in shapes]
    mine, exact = ([tensor.clone().requires_grad_() for tensor in given] for _ in "ab")
    y, expected = full_rank(*mine), naive_full_rank(*exact)
    torch.testing.assert_close(y, expected)
    slope = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad(y, mine, slope), torch.autograd.grad(expected, exact, slope), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", ["small", "many_rows"])
def test_both_roads_are_gone(size: str) -> None:
    """The small one by thin products, the other by weights that are built."""
    x, weight, *_ = inputs(size)
    assert kernels._worth_building(x.double(), weight.double()) == (size == "many_rows")


@pytest.mark.parametrize("size", ["small", "many_rows"])
@pytest.mark.parametrize("wanted", list(product([True, False], repeat=5))[:-1])
def test_only_the_gradients_that_are_asked_for(wanted: tuple[bool, ...], size: str) -> None:
    """As with frozen weights, or an input that is data."""
    given = [tensor.double() for tensor in inputs(size)]
    mine, exact = (
        [tensor.clone().requires_grad_(want) for tensor, want in zip(given, wanted, strict=True)] for _ in "ab"
    )
    ours(*mine).square().sum().backward()
    naive(*exact).square().sum().backward()
    for leaf, reference, want in zip(mine, exact, wanted, strict=True):
        assert (leaf.grad is not None) == want
        if want:
            torch.testing.assert_close(leaf.grad, reference.grad)


def test_no_rows() -> None:
    x, weight, a, b, bias = inputs("small")
    assert ours(x[:, :0], weight, a, b, bias).shape == (3, 0, 6)
    assert ours(x[:0], weight, a[:0], b[:0], bias).shape == (0, 4, 6)
    assert linear(x[:, :0], weight, bias).shape == (3, 0, 6)


class Layers(torch.nn.Module):
    """A layer of each kind, one after the other."""

    def forward(self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, residual: Tensor) -> Tensor:
        return full_rank_linear(low_rank_linear(linear(x, weight), weight, None, a, b, 0.5), weight, None, residual)


@pytest.mark.usefixtures("_backend")
def test_a_traced_program_is_for_any_number_of_rows() -> None:
    weights = (torch.randn(40, 40), torch.randn(2, 4, 40), torch.randn(2, 40, 4), torch.randn(2, 40, 40))
    rows = torch.export.Dim("rows", min=1)
    shapes = ({1: rows}, *[None] * len(weights))
    with torch.no_grad():
        program = torch.export.export(Layers(), (torch.randn(2, 8, 40), *weights), dynamic_shapes=shapes).module()
        for count in (1, 3000):
            x = torch.randn(2, count, 40)
            torch.testing.assert_close(program(x, *weights), Layers()(x, *weights), rtol=1e-4, atol=1e-2)
