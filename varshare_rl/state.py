"""Run state that is declared once: what a component keeps between two halves of an interrupted run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.types import Tree


class Stateful:
    """Component whose resumable state is the attributes named in ``state_fields``, base classes' first.

    An entry is ``"attribute"``; ``"key=attribute"`` where checkpoints know it by another name; with ``?`` at its
    end it may be missing in checkpoints of earlier versions, and the attribute then stays as it is. An attribute
    may be a property, for what is kept in another form than the one in use.

    Components, modules and optimisers give and take their own state; parameters and tensors keep their device,
    dicts, lists, tuples and sets their type; other values are stored as they are.
    """

    state_fields: ClassVar[tuple[str, ...]] = ()

    def state(self) -> Tree:
        """Return everything needed to go on, as a tree for :func:`varshare_rl.run.checkpoint.save_checkpoint`."""
        return self.declared_state("state_fields")

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave. Raises KeyError for an entry that is missing and not optional."""
        self.load_declared_state(state, "state_fields")

    def declared_state(self, declared: str) -> Tree:
        """Return the entries that the class attribute ``declared`` lists, for components also kept in part."""
        return {key: _taken(getattr(self, name)) for key, name, _ in self._entries(declared)}

    def load_declared_state(self, state: Tree, declared: str) -> None:
        """Put back what :meth:`declared_state` gave."""
        for key, name, optional in self._entries(declared):
            if key in state or not optional:
                current = getattr(self, name)
                put = _put(current, state[key])
                if put is not current:
                    setattr(self, name, put)

    @classmethod
    def _entries(cls, declared: str) -> Iterator[tuple[str, str, bool]]:
        """Yield key, attribute, and whether the entry may be missing."""
        for base in reversed(cls.__mro__):
            for entry in vars(base).get(declared, ()):
                key, _, name = entry.rstrip("?").partition("=")
                yield key, name or key, entry.endswith("?")


def _taken(value: Any) -> Any:
    if isinstance(value, Stateful):
        return value.state()
    if isinstance(value, nn.Module | torch.optim.Optimizer):
        return value.state_dict()
    if isinstance(value, dict):
        return {key: _taken(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_taken(item) for item in value)
    if isinstance(value, set):
        return sorted(value)
    return value.detach() if isinstance(value, Tensor) else value


def _put(current: Any, saved: Any) -> Any:
    if isinstance(current, Stateful):
        current.load_state(saved)
    elif isinstance(current, nn.Module | torch.optim.Optimizer):
        current.load_state_dict(saved)
    elif isinstance(current, nn.Parameter):
        if saved is not None:  # a checkpoint of before it had begun to learn
            with torch.no_grad():
                current.copy_(saved)
    elif isinstance(current, dict):
        return {key: _put(current.get(key), item) for key, item in dict(saved).items()}
    elif isinstance(current, list | tuple | set) and saved is not None:
        before = [*current, *[None] * len(saved)]
        return type(current)(_put(old, item) for old, item in zip(before, saved, strict=False))
    else:
        return saved.to(current.device) if isinstance(current, Tensor) and isinstance(saved, Tensor) else saved
    return current
