"""Time of a run by what it was spent on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseClock:
    """Seconds by phase; a phase inside another counts for itself alone.

    On CUDA, kernels still running when a phase ends count for the phase that waits for them.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside for ``phase``."""
        outer, self._phase = self._phase, phase
        self._switch(outer)
        try:
            yield
        finally:
            self._switch(phase)
            self._phase = outer

    def shares(self) -> dict[str, float]:
        """Return the share of the time by phase; ``rest`` is what no phase accounts for."""
        total = sum(self.seconds.values())
        return {phase: seconds / total for phase, seconds in self.seconds.items()} if total > 0 else {}

    def _switch(self, ending: str | None) -> None:
        now = time.perf_counter()
        if ending is not None:
            self.seconds[ending] = self.seconds.get(ending, 0.0) + now - self._since
        self._since = now
