"""The tasks that an agent had learnt before the sequence: their policies, and what they take to keep."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from varshare_rl.continual.method import Origin, Shape, Stored, settled, tensor_bytes


def origin_policy(shape: Shape, origin: Origin, task: int) -> nn.Module:
    """The network of one of the origin's tasks, ``W_i = theta + scale b_i a_i`` folded into plain layers.

    Args:
        shape: of the networks.
        origin: the agent of earlier tasks.
        task: its number there.

    Raises:
        IndexError: an unknown task id.
    """
    known = len(origin.adapters)
    if not 0 <= task < known:
        raise IndexError(f"unknown task id {task}: the agent of earlier tasks has {known}")
    network = shape.plain()
    network.load_state_dict(dict(origin.base))
    with torch.no_grad():
        for path, factors in origin.adapters[task].items():
            weight = network.get_submodule(path).get_parameter("theta")
            weight.add_(factors.delta().to(weight))
    return settled(network)


def origin_stored(origin: Origin | None) -> Stored:
    """What the origin's tasks need to be acted by :func:`origin_policy`: the base, and every task's factors."""
    if origin is None or not origin.adapters:
        return Stored(0, 0)
    factors: list[Tensor] = [
        tensor for adapter in origin.adapters for factor in adapter.values() for tensor in (factor.a, factor.b)
    ]
    return Stored(tensor_bytes(*origin.base.values()), tensor_bytes(*factors))
