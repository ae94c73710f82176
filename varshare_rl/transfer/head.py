"""A network as a body and a head: the last linear layer, and everything before it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from varshare_rl.errors import UserError
from varshare_rl.nn.mlp import BroNet, TaskMLP


def head_path(network: nn.Module, method: str) -> str:
    """The path of a network's last linear layer, ``layers.<last>``.

    Raises:
        UserError: nothing stands before it that ``method`` could keep apart, or the network has no such order.
    """
    if not isinstance(network, TaskMLP | BroNet):
        raise UserError(
            f"method={method} keeps heads apart, and a {type(network).__name__} has no last layer of its own; "
            "use blocks=mlp or blocks=bronet"
        )
    if len(network.layers) < 2:
        raise UserError(
            f"method={method} keeps heads apart from hidden layers, and this network has none; "
            "give it a hidden layer (hidden=[64], for example)"
        )
    return f"layers.{len(network.layers) - 1}"


def split_head(state: Mapping[str, Tensor], path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A network's state dict as that of its body and that of the head at ``path``, under the same names."""
    prefix = f"{path}."
    body = {name: value for name, value in state.items() if not name.startswith(prefix)}
    return body, {name: value for name, value in state.items() if name.startswith(prefix)}
