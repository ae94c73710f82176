"""Ranks as forks of the test's process, which has imported everything: a run of two takes a second."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from varshare_rl.commands import train


@dataclass
class Rank:
    """How a rank ended: its exit code, below zero for a signal, and what it has printed."""

    code: int
    out: str
    err: str


def run_ranks(
    *arguments: str,
    size: int = 2,
    before: Callable[[int], None] = lambda rank: None,
    main: Callable[[], None] = train.command,
    meanwhile: Callable[[list[int]], None] = lambda processes: None,
) -> list[Rank]:
    """Call ``main`` with arguments in so many ranks, after ``before(rank)``; ``meanwhile`` is given their ids."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    folder = Path(".ranks")
    folder.mkdir(exist_ok=True)
    processes = []
    for rank in range(size):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        processes.append(
            os.fork() or _child(rank, {name: str(n) for name, n in told.items()}, arguments, before, main)
        )
    try:
        meanwhile(processes)
        deadline = time.monotonic() + 500
        codes: dict[int, int] = {}
        while len(codes) < size and time.monotonic() < deadline:
            for process in processes:
                if process not in codes and (ended := os.waitpid(process, os.WNOHANG))[0]:
                    codes[process] = os.waitstatus_to_exitcode(ended[1])
            time.sleep(0.01)
        assert len(codes) == size, "the ranks hang"
    finally:
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
    texts = [[(folder / f"{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in range(size)]
    return [Rank(codes[process], *text) for process, text in zip(processes, texts, strict=True)]


def _child(
    rank: int,
    told: dict[str, str],
    arguments: tuple[str, ...],
    before: Callable[[int], None],
    main: Callable[[], None],
) -> int:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, kind in ((1, "out"), (2, "err")):
            file = Path(".ranks", f"{rank}.{kind}").open("w")  # noqa: SIM115
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(told, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
        before(rank)
        sys.argv = ["varshare_rl.train", *arguments]
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
