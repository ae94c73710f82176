"""One task's network alone, and as an ``nn.Sequential`` of PyTorch's own layers.

The mean of a linear layer's weight is itself a weight, so what a trained agent computes for one task on the
posterior mean is an ordinary multilayer perceptron, which needs nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import partial

from torch import Tensor, nn

from varshare_rl.errors import UserError
from varshare_rl.nn.layer import TaskLayer, task_layers
from varshare_rl.nn.mlp import ACTIVATIONS, LEAKY_SLOPE, SharedLayerNorm, TaskMLP, TaskNorm
from varshare_rl.nn.task_rows import TaskIds

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "leaky_relu": partial(nn.LeakyReLU, LEAKY_SLOPE),
}


class OneTask(nn.Module):
    """A network of many tasks as that of one, on the posterior mean; parameters are copies.

    Layers that have a weight of one task are that weight alone. Every architecture has this form.

    Args:
        network: task network; task: its number.

    Raises:
        IndexError: an unknown task id.
    """

    def __init__(self, network: nn.Module, task: int) -> None:
        super().__init__()
        self.network, self.task = deepcopy(network), task
        for name, layer in list(task_layers(self)):
            layer.check_task(task)
            with suppress(UserError):
                self.set_submodule(name, PlainLayer(layer.mean_linear(task)))
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, F]`` to ``[B, G]``."""
        return self.network(x, self.task)  # type: ignore[no-any-return]


class PlainLayer(nn.Module):
    """A linear layer in the place of a task layer; task id and temperature are accepted and ignored."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, task_id: TaskIds | None = None, temperature: float = 1.0) -> Tensor:
        """``[..., F]`` to ``[..., G]``."""
        return self.linear(x)  # type: ignore[no-any-return]


def merged(network: nn.Module, task: int) -> nn.Sequential:
    """Plain network that computes what ``network`` does for ``task`` on the posterior mean; parameters are copies.

    Every layer folds its own weight, see :meth:`~varshare_rl.nn.layer.TaskLayer.mean_linear`.

    Raises:
        IndexError: an unknown task id.
        UserError: the network's function for one task is not a multilayer perceptron that we know of.
    """

    def linear(layer: TaskLayer) -> nn.Linear:
        layer.check_task(task)
        return layer.mean_linear(task)

    return plain_network(network, linear, task)


def plain_network(network: nn.Module, linear: Callable[[TaskLayer], nn.Linear], task: int = 0) -> nn.Sequential:
    """``network`` with what ``linear`` makes of them in place of its task layers, in eval mode.

    Norms are those of ``task``, where tasks have their own.

    Raises:
        UserError: the network is not a :class:`~varshare_rl.nn.mlp.TaskMLP` of task layers.
    """
    if type(network) is not TaskMLP:
        raise UserError(
            f"a {type(network).__name__} has no plain form: only networks that are a multilayer perceptron for "
            "each task have one (blocks=mlp; network=varshare_lora, varshare, l2_soft, lora, shared, "
            "task_embedding, multi_head or independent)"
        )
    names = {function: name for name, function in ACTIVATIONS.items()}
    activation = _ACTIVATIONS.get(names.get(network.activation, ""))
    if activation is None:
        raise UserError(f"the activation {network.activation!r} has no module of its own in torch.nn")
    modules: list[nn.Module] = []
    layers = []
    for layer in network.layers:
        if not isinstance(layer, TaskLayer):
            raise UserError(f"a {type(layer).__name__} has no weight of one task to fold; a TaskLayer may have one")
        layers.append(linear(layer))
    for plain, norm in zip(layers, network.norms, strict=False):
        modules.append(plain)
        if isinstance(norm, SharedLayerNorm | TaskNorm):
            modules.append(norm.task_norm(task))
        modules.append(activation())
    return nn.Sequential(*modules, layers[-1]).eval()
