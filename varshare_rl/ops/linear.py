"""Matrix products of the layers, with the quickest kernels there are for them on a CPU.

On a CPU with AVX-512 that is not Intel's the products go to oneDNN: the BLAS that PyTorch otherwise calls keeps to
AVX2 there, at less than half the speed. Both compute in float32. Where
``torch.backends.mkldnn.matmul.fp32_precision`` is ``"bf16"``, large products go to oneDNN on every AVX-512, round
their factors and their result to bfloat16 (7 bits of fraction) and sum in float32.

A residual of low rank has two roads. Thin products ``(x A^T) B^T`` cost little arithmetic and run at a fraction
of the speed of wide ones; with many rows for each block it is quicker to build every block's weight
``theta + s B A`` and multiply once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from varshare_rl.ops.gradient_record import GradientRecord
from varshare_rl.processor import processor

_BACKEND: Any = torch.backends.mkldnn
_HAS_ONEDNN = (
    _BACKEND.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_ONEDNN = _HAS_ONEDNN and processor("vendor_id") != "GenuineIntel"  # in float32
#: Products of fewer multiplications gain nothing by another kernel or road.
_WORTH_ONEDNN = 1 << 17
#: A block's weight is built where it has fewer entries than this share of what thin products read and write.
_WORTH_BUILDING = 0.8
#: With fewer rows a block's weight is not worth building for a residual of full rank.
_ROWS_FOR_FULL_RANK = 32
#: Layers narrower than this on either side (heads) stay in float32: they cost little, and round most visibly.
_BFLOAT16_WIDTH = 64


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, record: GradientRecord | None = None) -> Tensor:
    """``x weight^T + bias``, as ``torch.nn.functional.linear``: ``[..., F]``, ``[G, F]``, ``[G]`` to ``[..., G]``.

    Differentiable at least once; the oneDNN path and the recorded one no more often. While ``record`` is listened
    to, gradients of weight and bias go there, apart by task. ``torch.autocast`` acts as on that function.
    """
    if _autocast(x):
        bias = None if bias is None else _cast(bias, x)
        x, weight = _cast(x, x), _cast(weight, x)
    if record is None and not _suits(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias, record)  # type: ignore[no-untyped-call]
    return y


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    record: GradientRecord | None = None,
    inner: Tensor | None = None,
) -> Tensor:
    """``x weight^T + scale (x a_k^T) b_k^T + bias`` for every block ``k``, by the quicker of two roads.

    ``x: [K, B, F]``, ``weight: [G, F]``, ``bias: [G]`` or None, ``a: [K, r, F]``, ``b: [K, G, r]``; returns
    ``[K, B, G]`` in the type of ``x weight^T``. Differentiable once. ``record`` as in :func:`linear`. ``inner``
    takes the place of ``x`` in the low-rank part, for an input that went through dropout.
    """
    if inner is not None or _autocast(x) or not x.dtype == a.dtype == b.dtype:
        return add_low_rank(linear(x, weight, bias, record), x if inner is None else inner, a, b, scale)
    if _worth_building(x, weight):
        return _built_linear(x, weight, bias, a, b, scale, record)
    product: Tensor = _LowRankLinear.apply(x, weight, bias, a, b, scale, record)  # type: ignore[no-untyped-call]
    return product


def full_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, record: GradientRecord | None = None
) -> Tensor:
    """``x (weight + residual_k)^T + bias`` for every block ``k``.

    ``x: [K, B, F]``, ``weight: [G, F]``, ``bias: [G]`` or None, ``residual: [K, G, F]``; returns ``[K, B, G]``.
    Differentiable at least once. ``record`` as in :func:`linear`.
    """
    alike = x.dtype == weight.dtype == residual.dtype and not _autocast(x)
    if alike and _sizes_decide(x) and x.shape[1] >= _ROWS_FOR_FULL_RANK and not _suits(x, weight):
        return _built_linear(x, weight, bias, residual, None, 1.0, record)
    return torch.baddbmm(linear(x, weight, bias, record), x, residual.transpose(1, 2))


def _built_linear(x: Tensor, *others: Any) -> Tensor:
    """Return :class:`_BuiltLinear` of its arguments."""
    product: Tensor = _BuiltLinear.apply(x, *others)  # type: ignore[no-untyped-call]
    return product


def _worth_building(x: Tensor, weight: Tensor) -> bool:
    """Return True where building every block's weight is quicker than thin products.

    Measured with PyTorch's own BLAS, to which all products go then; oneDNN has no batched ones.
    """
    outputs, inputs = weight.shape
    return (
        _sizes_decide(x)
        and outputs * inputs < _WORTH_BUILDING * x.shape[1] * (outputs + inputs)
        and x.numel() * outputs >= _WORTH_ONEDNN
        and not _suits(x, weight)
    )


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``y + scale (x a_k^T) b_k^T`` for every block ``k``, in the type of ``y`` and rounded to it once.

    ``y: [K, B, G]``, ``x: [K, B, F]``, ``a: [K, r, F]``, ``b: [K, G, r]``; the products are in the factors' type,
    or in that of ``torch.autocast``.
    """
    z = torch.bmm(x.to(a.dtype), a.transpose(1, 2))
    if y.dtype == z.dtype == b.dtype:
        return torch.baddbmm(y, z, b.transpose(1, 2), alpha=scale)
    return (y + scale * torch.bmm(z, b.transpose(1, 2))).to(y.dtype)


def _autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor as ``torch.autocast`` takes it into a product."""
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(like.device.type))


def _sizes_decide(x: Tensor) -> bool:
    """Return True where sizes decide the road of a product: on a CPU.

    Not in a program that is traced: it has to run on other machines, with other numbers of rows.
    """
    return x.is_cpu and not torch.compiler.is_compiling()


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Return True where oneDNN is to compute ``x weight^T``."""
    return (
        (_ONEDNN or (_HAS_ONEDNN and _BACKEND.matmul.fp32_precision == "bf16"))
        and x.dtype == weight.dtype == torch.float32
        and _sizes_decide(x)
        and x.numel() * weight.shape[0] >= _WORTH_ONEDNN
    )


def _factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, K]`` and ``[M, K]`` as their product takes them, and the products of its gradient: rounded where asked.

    Rounded once, they serve forward and backward: all three products have the same sizes in another order.
    """
    if (
        _BACKEND.matmul.fp32_precision == "bf16"
        and _suits(left, right)
        and min(*left.shape, len(right)) >= _BFLOAT16_WIDTH
    ):
        return left.bfloat16(), right.bfloat16()
    return left, right


def _product(left: Tensor, right: Tensor, kind: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """``left right^T + bias`` in type ``kind`` of ``[N, K]`` and ``[M, K]``, rounded alike, without a graph."""
    if not _suits(left, right):
        return F.linear(left, right, None if bias is None else bias.to(left.dtype)).to(kind)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(left), _dense(right), bias, "none", [], "")
    return product


def _dense(matrix: Tensor) -> Tensor:
    """Without gaps between rows or columns: oneDNN has no quick kernel for a slice of a wider matrix."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _unflat(flat: Tensor, shape: torch.Size) -> Tensor:
    """``[N, G]`` with the leading dimensions of ``shape``; no view for autograd, so it may be written into."""
    unflat: Tensor = torch.ops.aten._unsafe_view(flat, [*shape[:-1], flat.shape[1]])
    return unflat


def _recorded(record: GradientRecord | None, grad: Tensor, x: Tensor) -> bool:
    """Add the weight's and the bias's gradients to the rows of whoever listens; False if nobody does."""
    rows = None if record is None else record.takes(x, grad)
    if rows is None:
        return False
    weight, bias = rows
    if _suits(x[0], grad[0].t()):
        for block, grad_block, x_block in zip(weight, grad, x, strict=True):
            block.add_(_product(*_factors(grad_block.t(), x_block.t()), block.dtype))
    else:
        weight.baddbmm_(grad.transpose(1, 2).to(weight.dtype), x.to(weight.dtype))
    if bias is not None:
        bias.add_(grad.sum(1))
    return True


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, record: GradientRecord | None) -> Tensor:
        rows, columns = _factors(x.reshape(-1, x.shape[-1]), weight)
        ctx.save_for_backward(rows if record is None else x, columns)
        ctx.record, ctx.shape = record, x.shape
        return _unflat(_product(rows, columns, x.dtype, bias), x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        if need_weight and _recorded(ctx.record, grad, rows):
            need_weight = need_bias = False
        flat = grad.reshape(-1, grad.shape[-1])
        factor = flat.to(weight.dtype)
        return (
            _unflat(_product(factor, weight.t(), grad.dtype), ctx.shape) if need_x else None,
            _product(factor.t(), rows.reshape(-1, rows.shape[-1]).to(weight.dtype).t(), grad.dtype)
            if need_weight
            else None,
            flat.sum(0) if need_bias else None,
            None,
        )


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        record: GradientRecord | None,
    ) -> Tensor:
        z = torch.bmm(a, x.transpose(1, 2))  # [K, r, B]: thin matrices are quickest with the long side contiguous
        rows, columns = _factors(x.reshape(-1, x.shape[2]), weight)
        ctx.save_for_backward(x, rows, columns, a, b, z)
        ctx.scale, ctx.record = scale, record
        y = _unflat(_product(rows, columns, x.dtype, bias), x.shape)
        return y.baddbmm_(z.transpose(1, 2), b.transpose(1, 2), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, weight, a, b, z = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, _, _ = ctx.needs_input_grad
        if need_weight and _recorded(ctx.record, grad, x):
            need_weight = need_bias = False
        flat = grad.reshape(-1, grad.shape[2])
        factor = flat.to(weight.dtype)
        grad_x = grad_a = grad_b = None
        if need_b:
            grad_b = torch.bmm(z, grad).mul_(ctx.scale).transpose(1, 2)
        if need_x or need_a:
            grad_z = torch.bmm(b.transpose(1, 2), grad.transpose(1, 2)).mul_(ctx.scale)  # [K, r, B]
            if need_a:
                grad_a = torch.bmm(grad_z, x)
            if need_x:
                grad_x = _unflat(_product(factor, weight.t(), grad.dtype), x.shape).baddbmm_(
                    grad_z.transpose(1, 2), a
                )
        return (
            grad_x,
            _product(factor.t(), rows.t(), grad.dtype) if need_weight else None,
            flat.sum(0) if need_bias else None,
            grad_a,
            grad_b,
            None,
            None,
        )


class _BuiltLinear(torch.autograd.Function):
    """``x W_k^T + bias`` with ``W_k = weight + scale b_k a_k``, or ``weight + a_k`` without ``b``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor | None,
        scale: float,
        record: GradientRecord | None,
    ) -> Tensor:
        built = weight + a if b is None else torch.baddbmm(weight.expand(len(a), -1, -1), b, a, alpha=scale)
        ctx.save_for_backward(x, built, a, b)
        ctx.scale, ctx.record = scale, record
        if bias is None:
            return torch.bmm(x, built.transpose(1, 2))
        return torch.baddbmm(bias.view(1, 1, -1), x, built.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, built, a, b = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, _, _ = ctx.needs_input_grad
        grad_x = torch.bmm(grad, built) if need_x else None
        grad_a = grad_b = None
        of_built = grad  # stands for it where nobody asks
        if need_weight or need_a or need_b:
            of_built = torch.bmm(grad.transpose(1, 2), x)  # [K, G, F]
        if need_a:
            grad_a = of_built if b is None else torch.bmm(b.transpose(1, 2), of_built).mul_(ctx.scale)
        if need_b:
            grad_b = torch.bmm(of_built, a.transpose(1, 2)).mul_(ctx.scale)
        rows = ctx.record.takes(x, grad) if need_weight and ctx.record is not None else None
        if rows is not None:
            rows[0].add_(of_built)
            if rows[1] is not None:
                rows[1].add_(grad.sum(1))
            need_weight = need_bias = False
        return (
            grad_x,
            of_built.sum(0) if need_weight else None,
            grad.sum((0, 1)) if need_bias else None,
            grad_a,
            grad_b,
            None,
            None,
        )


def recorded_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, record: GradientRecord) -> Tensor:
    """``torch.nn.functional.layer_norm`` over the last dimension (Ba et al. 2016); ``[..., F]`` in and out.

    Differentiable once. While ``record`` is listened to, gradients of ``weight`` and ``bias`` go there.
    """
    y: Tensor = _LayerNorm.apply(x, weight, bias, epsilon, record)  # type: ignore[no-untyped-call]
    return y


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, record: GradientRecord
    ) -> Tensor:
        y, mean, inverse_std = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, epsilon)
        ctx.save_for_backward(x, weight, bias, mean, inverse_std)
        ctx.record = record
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse_std = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _ = ctx.needs_input_grad
        rows = ctx.record.takes(x, grad) if need_weight and need_bias else None
        if rows is not None:
            rows[0].add_(((x - mean) * inverse_std * grad).sum(1))
            rows[1].add_(grad.sum(1))
            need_weight = need_bias = False
        grads = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, [x.shape[-1]], mean, inverse_std, weight, bias, [need_x, need_weight, need_bias]
        )
        return (
            *(
                value if needed else None
                for value, needed in zip(grads, (need_x, need_weight, need_bias), strict=True)
            ),
            None,
            None,
        )
