"""Whether tasks pull shared parameters the same way: the inner products of their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def gradient_gram(losses: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """``<g_i, g_j>`` of ``g_i``, the gradient of ``losses[i]`` by ``parameters`` as one vector: ``[T, T]`` float64.

    A pair with a negative product is in conflict: a step that helps one of the two alone hurts the other, to first
    order (Yu et al. 2020, *Gradient Surgery for Multi-Task Learning*). Costs ``T`` backward passes, keeps the graph
    for the step that follows, leaves ``.grad`` as it is and draws no random number.
    """
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]))
    matrix = torch.stack(rows).detach()
    return (matrix @ matrix.t()).double()
