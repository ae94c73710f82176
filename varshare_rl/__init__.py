"""Multi-task reinforcement learning with shared weights and stochastic low-rank residuals per task.

``train`` and ``load`` give an ``Agent``; ``UserError`` is what the user got wrong, in one line. All but the latter
are imported when they are first used, so that ``import varshare_rl`` stays light: workers that step environments
import this package and need no torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from varshare_rl.errors import UserError

if TYPE_CHECKING:
    from varshare_rl.api import Agent, load, train

__all__ = ["Agent", "UserError", "__version__", "load", "train"]
__version__ = "0.1.0"


# Threads that wait for each other's part of a product would turn in circles for a millisecond, on cores that
# other processes need; read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if "RANK" in os.environ:  # under torchrun, where PyTorch warns in forty lines of what is said in one
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def __getattr__(name: str) -> Any:
    if name in ("Agent", "load", "train"):
        return getattr(import_module("varshare_rl.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
