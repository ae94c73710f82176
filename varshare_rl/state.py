"""Run state that is declared once: what a component keeps between two halves of an interrupted run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.types import Tree


class Stateful:
    """Component whose resumable state is the attributes named in ``state_fields``, base classes' first.

    An entry is ``"attribute"``; ``"key=attribute"`` where checkpoints know it by another name; with ``?`` at its end
    it may be missing in checkpoints of earlier versions, and the attribute then stays as it is.

    Components, modules and optimisers give and take their own state; parameters and tensors keep their device; other
    values (numbers, arrays, lists, dicts of these) are stored as they are.
    """

    state_fields: ClassVar[tuple[str, ...]] = ()

    def state(self) -> Tree:
        """Return everything needed to go on, as a tree for :func:`varshare_rl.run.checkpoint.save_checkpoint`."""
        return {key: _taken(getattr(self, name)) for key, name, _ in self._entries()}

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave. Raises KeyError for an entry that is missing and not optional."""
        for key, name, optional in self._entries():
            if key in state or not optional:
                setattr(self, name, _put(getattr(self, name), state[key]))

    @classmethod
    def _entries(cls) -> Iterator[tuple[str, str, bool]]:
        """Yield key, attribute, and whether the entry may be missing."""
        for base in reversed(cls.__mro__):
            for entry in vars(base).get("state_fields", ()):
                key, _, name = entry.rstrip("?").partition("=")
                yield key, name or key, entry.endswith("?")


def _taken(value: Any) -> Any:
    if isinstance(value, Stateful):
        return value.state()
    if isinstance(value, nn.Module | torch.optim.Optimizer):
        return value.state_dict()
    return value.detach() if isinstance(value, Tensor) else value


def _put(current: Any, saved: Any) -> Any:
    if isinstance(current, Stateful):
        current.load_state(saved)
    elif isinstance(current, nn.Module | torch.optim.Optimizer):
        current.load_state_dict(saved)
    elif isinstance(current, nn.Parameter):
        with torch.no_grad():
            current.copy_(saved)
    else:
        return saved.to(current.device) if isinstance(current, Tensor) and isinstance(saved, Tensor) else saved
    return current
