"""Steps that are begun in several turns."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class PendingActions:
    """Which environments of every task have been given their action for the step under way.

    Args:
        num_tasks: ``T``.
        envs_per_task: ``E``.
    """

    def __init__(self, num_tasks: int, envs_per_task: int) -> None:
        self.num_tasks = num_tasks
        self.given = np.zeros(envs_per_task, dtype=np.bool_)

    def give(self, actions: npt.NDArray[Any], envs: slice, action_shape: tuple[int, ...]) -> None:
        """Note that ``envs`` have theirs; ``action_shape`` is that of one: ``(A,)`` for Box, ``()`` for Discrete.

        Raises:
            ValueError: ``actions`` is not ``[T, len(envs), *action_shape]``.
            RuntimeError: one of them has its action already.
        """
        expected = (self.num_tasks, len(self.given[envs]), *action_shape)
        if actions.shape != expected:
            raise ValueError(f"actions have shape {actions.shape}; this engine takes {expected}")
        if self.given[envs].any():
            raise RuntimeError("an environment was given a second action: call finish first")
        self.given[envs] = True

    @property
    def begun(self) -> bool:
        """Whether any environment has its action."""
        return bool(self.given.any())

    def complete(self) -> None:
        """End the step. Raises RuntimeError if an environment has no action."""
        if not self.given.all():
            missing = np.flatnonzero(~self.given).tolist()
            raise RuntimeError(f"finish before environments {missing} were given an action: call begin for them")
        self.clear()

    def clear(self) -> None:
        """Forget a step that was begun."""
        self.given[:] = False
