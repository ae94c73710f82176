"""A trained multi-task network as the origin of a sequence: its shared weights, and its tasks' corrections."""

from __future__ import annotations

from torch import nn

from varshare_rl.continual.low_rank import take_adapter, take_spread
from varshare_rl.continual.method import Origin
from varshare_rl.nn.bronet import BroNet
from varshare_rl.nn.l2_soft import L2SoftLayer
from varshare_rl.nn.mlp import TaskMLP
from varshare_rl.nn.residual import ResidualLayer
from varshare_rl.nn.varshare_lora import VarShareLoRALayer
from varshare_rl.types import UserError

_LOW_RANK = (VarShareLoRALayer, ResidualLayer, L2SoftLayer)
_CURE = "networks that a sequence can go on from are varshare_lora, lora, and l2_soft with a rank"


def origin_of(network: nn.Module, num_tasks: int) -> Origin:
    """The origin that a multi-task network of low-rank corrections is.

    ``theta``, biases and norms are the base, in the names of :meth:`Shape.plain` with the same hidden sizes and
    blocks; task ``i``'s factors, or the means of their posteriors, are adapter ``i``. Base plus adapter computes
    bit for bit what the network computes for the task in evaluation. Spreads come from VarShare-LoRA alone.

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
        if type(layer) not in _LOW_RANK or getattr(layer, "rank", None) is None:
            raise UserError(f"a {type(layer).__name__} has no low-rank correction of its own per task; {_CURE}")
        assert isinstance(layer, VarShareLoRALayer | ResidualLayer)
        if layer.num_tasks != num_tasks:
            raise UserError(
                f"the network is for {layer.num_tasks} tasks, not {num_tasks}; give the one it was trained on"
            )
        for name in (*layer.per_task_parameters, "log_prior_scale"):
            base.pop(f"layers.{path}.{name}", None)
    spreads = tuple(take_spread(network, task) for task in range(num_tasks))
    return Origin(
        base={name: value.detach().cpu().clone() for name, value in base.items()},
        adapters=tuple(take_adapter(network, task) for task in range(num_tasks)),
        spreads=spreads if any(spreads) else (),
    )
