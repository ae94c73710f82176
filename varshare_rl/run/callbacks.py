"""Functions of the user that are called while a run trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from varshare_rl.run.evaluation import Evaluation
from varshare_rl.types import Metrics


@dataclass(frozen=True)
class Callbacks:
    """What is called at which moment, with the transitions of all tasks so far first.

    A return value of ``False`` from ``on_log`` or ``on_evaluate`` ends the training there, as if all its
    transitions were done.

    Attributes:
        on_log: takes the metrics by name, every ``log.every`` transitions.
        on_evaluate: takes the :class:`Evaluation`: means over episodes by task.
        on_checkpoint: takes the folder of the checkpoint, last or best, when all of it is on the disk.
    """

    on_log: Callable[[int, Metrics], object] | None = None
    on_evaluate: Callable[[int, Evaluation], object] | None = None
    on_checkpoint: Callable[[int, Path], object] | None = None


def is_false(answer: object) -> bool:
    """Return True for ``False``, numpy's too; a function that returns nothing says nothing."""
    return isinstance(answer, bool | np.bool_) and not answer
