"""The low-rank corrections of a trained network's tasks as LoRA adapters of its shared network."""

from __future__ import annotations

from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter
from varshare_rl.nn.layer import TaskLayer
from varshare_rl.nn.merge import plain_network


def base_network(network: nn.Module) -> nn.Sequential:
    """The network of ``theta`` alone, without any task's correction; parameters are copies.

    Raises:
        UserError: a layer is neither a shared one nor one with a low-rank correction.
    """
    return plain_network(network, lambda layer: layer.shared_linear())


def task_adapter(network: nn.Module, task: int) -> Adapter:
    """The corrections of one task as an adapter of :func:`base_network`.

    With it the base computes what the network computes for the task in evaluation. Layers without a correction are
    not in it.

    Raises:
        IndexError: an unknown task id.
        UserError: as :func:`base_network`.
    """
    parts = {path: layer.correction(task) for path, layer in _layers_by_path(network, task).items()}
    return {path: part for path, part in parts.items() if part is not None}


def task_rho(network: nn.Module, task: int) -> dict[str, Tensor]:
    """Part of the posteriors that a LoRA adapter has no room for: ``rho`` and the prior's scale, by path and name.

    Empty without posteriors.

    Raises:
        As :func:`task_adapter`.
    """
    layers = _layers_by_path(network, task)
    return {f"{path}.{name}": rho for path, layer in layers.items() for name, rho in layer.task_rho(task).items()}


def plain_paths(network: nn.Module) -> dict[str, str]:
    """The path that each linear layer ``layers.<i>`` has in :func:`base_network`. Errors as there."""
    plain = [path for path, module in base_network(network).named_children() if isinstance(module, nn.Linear)]
    return {f"layers.{place}": path for place, path in enumerate(plain)}


def _layers_by_path(network: nn.Module, task: int) -> dict[str, TaskLayer]:
    """The layers by the path that their linear layer has in the plain network."""
    layers = {}
    for own, path in plain_paths(network).items():
        layer = network.get_submodule(own)
        assert isinstance(layer, TaskLayer)
        layer.check_task(task)
        layers[path] = layer
    return layers
