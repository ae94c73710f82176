"""What each trained parameter is: shared by the tasks or one task's own, and how it is optimised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from torch import nn


class Kind(Enum):
    """The kinds of parameters that have a learning rate of their own."""

    theta = "theta"  # everything that is no adapter
    mean = "mean"  # of an adapter: parameters of one task in a layer that the tasks share otherwise
    spread = "spread"  # the rho of an adapter


@dataclass(frozen=True)
class Role:
    """One parameter; ``own``: dim 0 is the task; ``decays``: it is a weight that weight decay may act on."""

    parameter: nn.Parameter
    own: bool
    kind: Kind
    decays: bool


def roles(trained: nn.Module | Iterable[nn.Parameter]) -> list[Role]:
    """The roles of all parameters that require a gradient, in the module's order.

    Layers name stacked parameters (dim 0 is the task) in ``per_task_parameters``, and the spreads among them in
    ``spread_parameters``. Weights are the shared parameters of two dimensions or more, and of three or more where
    dim 0 is the task (of layers that share nothing) or, as a layer says by ``stacks_copies``, a copy of a layer;
    parameters outside a module count as shared and do not decay.
    """
    if not isinstance(trained, nn.Module):
        return [Role(parameter, False, Kind.theta, False) for parameter in trained]
    found: dict[int, Role] = {}
    for layer in trained.modules():
        stacked = set(getattr(layer, "per_task_parameters", ()))
        spreads = set(getattr(layer, "spread_parameters", ()))
        copies = getattr(layer, "stacks_copies", False)
        parameters = dict(layer.named_parameters(recurse=False))
        adapter = any(name not in stacked for name in parameters)
        for name, parameter in parameters.items():
            own = name in stacked
            kind = Kind.spread if name in spreads else Kind.mean if own and adapter else Kind.theta
            decays = kind is Kind.theta and parameter.dim() >= (3 if own or copies else 2)
            found.setdefault(id(parameter), Role(parameter, own, kind, decays))
    return [found[id(parameter)] for parameter in trained.parameters() if parameter.requires_grad]
