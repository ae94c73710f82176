"""Trained multi-task networks that a sequence goes on from: shared weights, adapters and policies."""

from __future__ import annotations

import torch
from torch import nn

from varshare_rl.errors import UserError
from varshare_rl.nn.layer import TaskLayer
from varshare_rl.nn.mlp import BroNet, TaskMLP
from varshare_rl.transfer.low_rank import adapter_bytes, take_adapter, take_sigma
from varshare_rl.transfer.method import NetworkSpec, Pretrained, StorageCost, frozen_eval, state_bytes


def pretrained_policy(spec: NetworkSpec, pretrained: Pretrained, task: int) -> nn.Module:
    """Make the network of a pretrained agent's task, ``W_i = theta + scale b_i a_i`` folded into plain layers.

    Args:
        spec: of the networks.
        pretrained: the agent of earlier tasks.
        task: its number there.

    Raises:
        IndexError: an unknown task id.
    """
    known = len(pretrained.adapters)
    if not 0 <= task < known:
        raise IndexError(f"unknown task id {task}: the agent of earlier tasks has {known}")
    network = spec.plain(pretrained.base)
    with torch.no_grad():
        for path, factors in pretrained.adapters[task].items():
            weight = network.get_submodule(path).get_parameter("theta")
            weight.add_(factors.delta().to(weight))
    return frozen_eval(network)


def pretrained_storage(pretrained: Pretrained | None) -> StorageCost:
    """Return the bytes that :func:`pretrained_policy` needs for all tasks: the base, and every task's factors."""
    if pretrained is None or not pretrained.adapters:
        return StorageCost()
    return StorageCost(state_bytes(pretrained.base), sum(map(adapter_bytes, pretrained.adapters)))


_CURE = "networks that a sequence can go on from are varshare_lora, lora, and l2_soft with a rank"


def pretrained_from(network: nn.Module, num_tasks: int) -> Pretrained:
    """Return the pretrained agent that a multi-task network of low-rank corrections is.

    ``theta``, biases and norms are the base, in the names of :meth:`NetworkSpec.plain` with the same hidden sizes
    and blocks; task ``i``'s factors, or the means of their posteriors, are adapter ``i``. Base and adapter compute
    bit for bit what the network computes for the task in evaluation. Only VarShare-LoRA has standard deviations.

    Args:
        network: of ``network=varshare_lora``, ``lora`` or ``l2_soft``.
        num_tasks: its tasks, ``T``.

    Raises:
        UserError: the network is of another kind, or for another number of tasks.
    """
    if type(network) not in (TaskMLP, BroNet):
        raise UserError(f"a {type(network).__name__} is not one shared network with corrections; {_CURE}")
    base = dict(network.state_dict())
    for path, layer in network.get_submodule("layers").named_children():
        if not isinstance(layer, TaskLayer) or layer.correction(0) is None:
            raise UserError(f"a {type(layer).__name__} has no low-rank correction of its own per task; {_CURE}")
        if layer.num_tasks != num_tasks:
            raise UserError(
                f"the network is for {layer.num_tasks} tasks, not {num_tasks}; give the one it was trained on"
            )
        for name in (*layer.per_task_parameters, *layer.per_task_buffers):
            base.pop(f"layers.{path}.{name}", None)
    sigmas = tuple(take_sigma(network, task) for task in range(num_tasks))
    return Pretrained(
        base={name: value.detach().cpu().clone() for name, value in base.items()},
        adapters=tuple(take_adapter(network, task) for task in range(num_tasks)),
        sigmas=sigmas if any(sigmas) else (),
    )
