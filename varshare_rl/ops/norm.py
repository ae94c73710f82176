"""LayerNorm whose shared scale and offset can have their gradients told apart by task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varshare_rl.ops.recording import Recording


def recorded_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, record: Recording) -> Tensor:
    """``torch.nn.functional.layer_norm`` over the last dimension (Ba et al. 2016); ``[..., F]`` in and out.

    Differentiable once. While ``record`` is listened to, gradients of ``weight`` and ``bias`` go there.
    """
    y: Tensor = _LayerNorm.apply(x, weight, bias, epsilon, record)  # type: ignore[no-untyped-call]
    return y


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, record: Recording) -> Tensor:
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
