"""Types that everything shares. Knows nothing else of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: Nested dicts and lists with leaves Tensor, ndarray, int, float, str, bool or None: what checkpoints hold.
Tree = dict[str, Any]

#: Scalars to log, by metric name.
Metrics = dict[str, float]

#: The same as an update leaves them: tensors are read only when they are logged. What is ``[T]`` is logged of each
#: task, as ``<name>/<task>``.
Scalars = dict[str, Tensor | float]


@dataclass(frozen=True)
class Transition:
    """One vector step of all tasks, as tensors on the learner's device."""

    obs: Tensor  # [T, E, F]
    action: Tensor  # [T, E, A] float, or [T, E] int64 for discrete actions
    reward: Tensor  # [T, E]
    terminated: Tensor  # [T, E] bool
    truncated: Tensor  # [T, E] bool
    next_obs: Tensor  # [T, E, F] the true successor, also at an episode's end
