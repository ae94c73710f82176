"""A stand-in for torch's compiler, which takes two seconds to import and which nothing here compiles with.

torch's optimisers, and much that runs without data, import ``torch._dynamo`` only to tell it where not to compile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"


class _StandIn(ModuleType):
    """Has the two functions that do nothing where nobody compiles; makes way for the module where more is asked."""

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """Compile no further: nothing is compiled."""

    @staticmethod
    def disable(fn: Callable[..., Any], recursive: bool = True, **_: Any) -> Callable[..., Any]:
        """Return a function that is not compiled: nothing is."""
        return fn

    def __getattr__(self, name: str) -> Any:
        if name in ("__file__", "__wrapped__"):  # asked by those who look through all modules
            raise AttributeError(name)
        if sys.modules.get(NAME) is self:
            del sys.modules[NAME]
        return getattr(import_module(NAME), name)


def put_off_compiler() -> None:
    """Let ``torch._dynamo`` be imported when something of it is used, for this process."""
    sys.modules.setdefault(NAME, _StandIn(NAME))
