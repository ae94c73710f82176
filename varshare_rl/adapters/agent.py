"""A trained agent's VarShare-LoRA corrections as LoRA adapters of its shared network."""

from __future__ import annotations

from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter, LowRank
from varshare_rl.nn.merge import WeightBias, plain_network
from varshare_rl.nn.varshare_lora import VarShareLoRALayer
from varshare_rl.types import UserError


def base_network(network: nn.Module) -> nn.Sequential:
    """The network of ``theta`` alone, without any task's correction; parameters are copies.

    Raises:
        UserError: the network's layers are not VarShare-LoRA.
    """

    def theta(layer: nn.Module) -> WeightBias:
        layer = _lora_layer(layer)
        return layer.theta, layer.bias

    return plain_network(network, theta)


def task_adapter(network: nn.Module, task: int) -> Adapter:
    """The posterior mean of one task as an adapter of :func:`base_network`: ``a = mus_A[i]``, ``b = mus_B[i]``.

    The scale is the layers' ``alpha / r``. With it the base computes what the agent computes for the task in
    evaluation.

    Raises:
        IndexError: an unknown task id.
        UserError: the network's layers are not VarShare-LoRA.
    """
    adapter = {}
    for path, layer in _layers_by_path(network, task).items():
        adapter[path] = LowRank(layer.mus_A[task].detach().clone(), layer.mus_B[task].detach().clone(), layer.scale)
    return adapter


def task_spread(network: nn.Module, task: int) -> dict[str, Tensor]:
    """What a LoRA adapter has no room for: ``rho`` of both factors and the prior's scale, by path and name.

    Raises:
        As :func:`task_adapter`.
    """
    spread = {}
    for path, layer in _layers_by_path(network, task).items():
        spread[f"{path}.rho_A"] = layer.rhos_A[task].detach().clone()
        spread[f"{path}.rho_B"] = layer.rhos_B[task].detach().clone()
        spread[f"{path}.prior_scale"] = layer.theta.new_tensor(layer.prior_scale)
    return spread


def _layers_by_path(network: nn.Module, task: int) -> dict[str, VarShareLoRALayer]:
    """The layers by the path that their linear layer has in the plain network."""
    paths = [path for path, module in base_network(network).named_children() if isinstance(module, nn.Linear)]
    layers = [_lora_layer(layer) for layer in network.get_submodule("layers").children()]
    known = layers[0].num_tasks
    if not 0 <= task < known:
        raise IndexError(f"unknown task id {task}: this network has {known} tasks (0 to {known - 1})")
    return dict(zip(paths, layers, strict=True))


def _lora_layer(layer: nn.Module) -> VarShareLoRALayer:
    if type(layer) is not VarShareLoRALayer:
        raise UserError(
            f"a {type(layer).__name__} has no low-rank correction that could be an adapter; "
            "networks of network=varshare_lora have"
        )
    return layer
