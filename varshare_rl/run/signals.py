"""Signals to stop: a run that is told to ends with everything saved."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

#: What stops a run: the user, a scheduler, and a terminal that is closed, unless that is ignored (``nohup``).
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """Training was asked to stop by a signal and has saved its state."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


@contextmanager
def answering(answer: Callable[[int], None], each: bool) -> Iterator[None]:
    """Inside, call ``answer`` with a signal to stop instead of dying; a second one acts at once.

    ``each``: the first of each kind is answered, as launchers send one after the user's; else the first of all.
    """
    before = {number: signal.getsignal(number) for number in STOPPING}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def note(number: int, frame: FrameType | None) -> None:
        answer(number)
        for kind in [signal.Signals(number)] if each else before:
            signal.signal(kind, before[kind])

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, before[number])
