"""Signals to stop: a run that is told to ends with everything saved."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from varshare_rl.envs.workers import STOPPING

#: Handlers of signals, as ``signal.getsignal`` gives them.
Handlers = Mapping[signal.Signals, Any]


class Interrupted(Exception):
    """Training was asked to stop by a signal and has saved its state."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


@contextmanager
def handling(kinds: Sequence[signal.Signals], handle: Callable[[int, Handlers], None]) -> Iterator[None]:
    """Inside, call ``handle`` with a signal of these kinds and the handlers before; not with SIGHUP if ignored."""
    before = {kind: signal.getsignal(kind) for kind in kinds}
    if before.get(signal.SIGHUP) is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for kind in before:
        signal.signal(kind, lambda number, frame: handle(number, before))
    try:
        yield
    finally:
        for kind in before:
            signal.signal(kind, before[kind])


@contextmanager
def answering(answer: Callable[[int], None], each: bool) -> Iterator[None]:
    """Inside, call ``answer`` with a signal to stop instead of dying; a second one acts at once.

    ``each``: the first of each kind is answered, as launchers send one after the user's; else the first of all.
    """

    def note(number: int, before: Handlers) -> None:
        answer(number)
        for kind in [signal.Signals(number)] if each else before:
            signal.signal(kind, before[kind])

    with handling(STOPPING, note):
        yield
