"""The low-rank corrections of a trained network's tasks as LoRA adapters of its shared network."""

from __future__ import annotations

from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter, LowRank
from varshare_rl.errors import UserError
from varshare_rl.nn.lora import L2SoftLayer, ResidualLayer
from varshare_rl.nn.merge import WeightBias, plain_network
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.nn.varshare_lora import VarShareLoRALayer


def base_network(network: nn.Module) -> nn.Sequential:
    """The network of ``theta`` alone, without any task's correction; parameters are copies.

    Raises:
        UserError: a layer is neither a shared one nor one with a low-rank correction.
    """
    return plain_network(network, _theta)


def task_adapter(network: nn.Module, task: int) -> Adapter:
    """The corrections of one task as an adapter of :func:`base_network`, see :func:`correction`.

    With it the base computes what the network computes for the task in evaluation. Layers without a correction are
    not in it.

    Raises:
        IndexError: an unknown task id.
        UserError: as :func:`base_network`.
    """
    parts = {path: correction(layer, task) for path, layer in _layers_by_path(network, task).items()}
    return {path: part for path, part in parts.items() if part is not None}


def correction(layer: nn.Module, task: int) -> LowRank | None:
    """Copies of a layer's factors for one task, or of the means of their posteriors; None if it has none.

    The scale is the layer's ``alpha / r``.
    """
    if isinstance(layer, VarShareLoRALayer):
        a, b = layer.mus_A[task], layer.mus_B[task]
    elif isinstance(layer, ResidualLayer) and layer.rank is not None:
        a, b = layer.factors_A[task], layer.factors_B[task]
    else:
        return None
    return LowRank(a.detach().clone(), b.detach().clone(), layer.scale)


def task_rho(network: nn.Module, task: int) -> dict[str, Tensor]:
    """What a LoRA adapter has no room for: ``rho`` of both factors and the prior's scale, by path and name.

    Empty without posteriors.

    Raises:
        As :func:`task_adapter`.
    """
    spread = {}
    for path, layer in _layers_by_path(network, task).items():
        if isinstance(layer, VarShareLoRALayer):
            spread[f"{path}.rho_A"] = layer.rhos_A[task].detach().clone()
            spread[f"{path}.rho_B"] = layer.rhos_B[task].detach().clone()
            spread[f"{path}.prior_scale"] = layer.prior_scale[task]
    return spread


def plain_paths(network: nn.Module) -> dict[str, str]:
    """The path that each linear layer ``layers.<i>`` has in :func:`base_network`. Errors as there."""
    plain = [path for path, module in base_network(network).named_children() if isinstance(module, nn.Linear)]
    return {f"layers.{place}": path for place, path in enumerate(plain)}


def _layers_by_path(network: nn.Module, task: int) -> dict[str, nn.Module]:
    """The layers by the path that their linear layer has in the plain network."""
    layers = {path: network.get_submodule(own) for own, path in plain_paths(network).items()}
    for layer in layers.values():
        known = getattr(layer, "num_tasks", None)
        if known is not None and not 0 <= task < known:
            raise IndexError(f"unknown task id {task}: this network has {known} tasks (0 to {known - 1})")
    return layers


def _theta(layer: nn.Module) -> WeightBias:
    if type(layer) is SharedLayer and not layer.one_hot_tasks:
        return layer.theta, layer.bias
    if type(layer) not in (VarShareLoRALayer, ResidualLayer, L2SoftLayer) or getattr(layer, "rank", None) is None:
        raise UserError(
            f"a {type(layer).__name__} has no low-rank correction that could be an adapter; networks of "
            "network=varshare_lora, lora, and l2_soft with a rank have"
        )
    assert isinstance(layer, VarShareLoRALayer | ResidualLayer)
    return layer.theta, layer.bias
