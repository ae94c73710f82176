"""Counts and rules of the loop."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class OnDivergence(Enum):
    """What follows where a task's loss or gradient is NaN or infinite."""

    mask = "mask"  # the step leaves the task out, see divergence_guard
    stop = "stop"  # the run ends, with the last checkpoint to go on from
    rollback = "rollback"  # the run goes on from the last checkpoint with half the learning rate


@dataclass
class LoopConfig:
    """Counts are transitions of all tasks together; 0, also of the minutes, switches the thing off."""

    total_transitions: int
    evaluate_every: int
    evaluate_episodes: int
    checkpoint_every: int
    log_every: int
    checkpoint_minutes: float = 0.0
    checkpoint_keep: int = 2
    checkpoint_wait_minutes: float = 0.0
    on_divergence: OnDivergence = OnDivergence.mask
    observe_every: int = 0
    overlap: bool = False
    tasks_per_rank: int | None = None
