"""Names of layers as people read them."""

from __future__ import annotations

from collections.abc import Iterable


def short_names(names: Iterable[str]) -> list[str]:
    """``actor.network.layers.0`` as ``actor 0``, ``critic.networks.1.layers.2`` as ``critic 1 2``."""
    technical = ("network", "networks", "layers")
    return [" ".join(part for part in name.split(".") if part not in technical) for name in names]
