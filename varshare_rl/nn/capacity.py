"""Widths that give different architectures the same capacity: so many active parameters per task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import nn

from varshare_rl.errors import UserError
from varshare_rl.nn.config import Architecture
from varshare_rl.nn.parameters import count_parameters

#: How far from the number that was asked for an agent may be, as a fraction of it.
TOLERANCE = 0.02


def with_width(architecture: Architecture, width: int) -> Architecture:
    """The same options with hidden layers that are as many as before and all of one ``width``."""
    changed = copy(architecture)
    changed.hidden = [width] * len(architecture.hidden)
    return changed


def match_width(
    architecture: Architecture, build: Callable[[Architecture], Sequence[nn.Module]], num_tasks: int
) -> list[int]:
    """The hidden sizes, all equal, that come nearest to ``architecture.active_parameters``.

    What is counted is ``active_per_task`` of :func:`varshare_rl.nn.parameters.count_parameters` over the networks
    that ``build`` makes from an architecture. They are built without memory, for a number of widths that is
    logarithmic in the result: the count grows with the width.

    Raises:
        UserError: no width comes within :data:`TOLERANCE`.
    """
    target, least = architecture.active_parameters, architecture.least_width()
    assert target is not None
    if not architecture.hidden:
        raise UserError(
            "network.active_parameters sets the width of hidden layers, and network.hidden has none; "
            "give network.hidden=[64,64] for two, or leave active_parameters out"
        )

    def active(width: int) -> int:
        candidate = with_width(architecture, width)
        with torch.device("meta"):
            return count_parameters(build(candidate), num_tasks).active_per_task

    below, above = least, least + 1
    while active(above) < target:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if active(middle) < target else (below, middle)
    counts = {width: active(width) for width in (below, above)}
    best = min(counts, key=lambda width: abs(counts[width] - target))
    if abs(counts[best] - target) > TOLERANCE * target:
        layers = len(architecture.hidden)
        agent = f"network={architecture.name} with {layers} hidden layers"
        found = (
            f"the smallest {agent} has {counts[below]}; give at least that many"
            if target < counts[below]
            else f"the nearest of {agent} are {counts[below]} and {counts[above]}; give one of them"
        )
        raise UserError(f"network.active_parameters is {target}; {found}")
    return [best] * len(architecture.hidden)
