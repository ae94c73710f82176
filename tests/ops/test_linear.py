"""The layers' matrix products in float32, at sizes where the quick kernels are used, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varshare_rl.ops.linear import linear, low_rank_linear

Function = Callable[..., Tensor]
BLOCKS, ROWS, IN, OUT, RANK, SCALE = 3, 40, 80, 96, 4, 1.5


@pytest.fixture
def bfloat16() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def inputs() -> list[Tensor]:
    """x, weight, bias, a and b; x and the weight are slices of wider tensors, as batches and one-hot weights."""
    x = torch.randn(BLOCKS, ROWS, IN + 5)[..., :IN]
    weight = torch.randn(OUT, IN + 3)[:, :IN]
    return [x, weight, torch.randn(OUT), torch.randn(BLOCKS, RANK, IN), torch.randn(BLOCKS, OUT, RANK)]


def explicit(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([F.linear(x[k], weight + SCALE * b[k] @ a[k], bias) for k in range(len(x))])


def ours(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return low_rank_linear(x, weight, bias, a, b, SCALE)


def values_and_gradients(function: Function, tensors: list[Tensor], relu: bool) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    if relu:  # outputs may be written into
        y = F.relu_(y)
    target = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * target).sum(), leaves)]


def errors(function: Function, naive: Function, tensors: list[Tensor], relu: bool = True) -> list[float]:
    """Largest error of the value and each gradient, relative to its standard deviation."""
    got = values_and_gradients(function, tensors, relu)
    expected = values_and_gradients(naive, [tensor.double() for tensor in tensors], relu)
    return [((g - e).abs().max() / e.std()).item() for g, e in zip(got, expected, strict=True)]


def test_linear_in_float32() -> None:
    assert max(errors(linear, F.linear, inputs()[:3])) < 1e-4
    assert max(errors(lambda x, w: linear(x, w), lambda x, w: F.linear(x, w), inputs()[:2])) < 1e-4


def test_low_rank_linear_in_float32() -> None:
    assert max(errors(ours, explicit, inputs())) < 1e-4


@pytest.mark.usefixtures("bfloat16")
def test_bfloat16_is_used_when_asked_for_and_only_rounds() -> None:
    assert max(errors(linear, F.linear, inputs()[:3], relu=False)) < 0.05
    assert max(errors(ours, explicit, inputs(), relu=False)) < 0.05
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert errors(linear, F.linear, inputs()[:3])[0] > 1e-4
    narrow = [torch.randn(4000, IN), torch.randn(8, IN), torch.randn(8)]
    assert max(errors(linear, F.linear, narrow)) < 1e-4  # heads stay in float32


def test_frozen_weights_get_no_gradient() -> None:
    x, weight, bias, a, b = inputs()
    x.requires_grad_()
    ours(x, weight, bias, a, b).sum().backward()
    assert x.grad is not None
    assert weight.grad is a.grad is b.grad is bias.grad is None


def test_gradients_of_the_low_rank_product() -> None:
    tensors = [tensor.double().requires_grad_() for tensor in (
        torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5), torch.randn(2, 2, 4), torch.randn(2, 5, 2),
    )]  # fmt: skip
    assert torch.autograd.gradcheck(ours, tensors)
