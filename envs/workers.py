"""Worker processes that step chunks of slots, over shared memory.

Workers are plain interpreters, not forks and not ``multiprocessing`` children: a fork would copy a parent
with running threads, and ``spawn`` would import the parent's main module (and torch with it) again. Commands
are one byte over a socket pair, which the operating system closes when either side dies; arrays go through
an anonymous shared file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from envs.slots import Buffers, Chunk, EngineSpec, TaskEnvFactory
from envs.suite import State, SuiteError

RESET, STEP, STATE, LOAD = b"r", b"s", b"g", b"l"
_DONE, _VALUE, _REFUSED, _FAILED = b"d", b"v", b"e", b"f"

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from envs.workers import main; main()"

#: One thread per worker: the workers are the parallelism.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class WorkerError(RuntimeError):
    """A worker process failed or died. The message holds its traceback."""


def can_use_workers() -> bool:
    """Whether this system can hand file descriptors to child processes (Windows cannot)."""
    return os.name == "posix"


class WorkerPool:
    """``count`` processes, each with a contiguous chunk of the slots. They start side by side."""

    def __init__(self, factory: TaskEnvFactory, spec: EngineSpec, count: int) -> None:
        try:
            payload = pickle.dumps((spec, factory))
        except Exception as error:
            raise SuiteError(
                f"workers={count} needs environments that other processes can import ({error}); use workers=1"
            ) from error
        with tempfile.TemporaryFile(dir=_memory_folder()) as file:
            file.truncate(Buffers.size(spec))
            self.buffers = Buffers.over(spec, mmap.mmap(file.fileno(), Buffers.size(spec)))
            self._processes: list[subprocess.Popen[bytes]] = []
            self._connections: list[Connection[Any, Any]] = []
            self.close = weakref.finalize(self, _shut_down, self._processes, self._connections)
            edges = [spec.num_slots * k // count for k in range(count + 1)]
            self._ranges = list(itertools.pairwise(edges))
            for start, stop in self._ranges:
                self._start(payload, start, stop, file.fileno())
        self._pending = [1] * count  # every worker reports once when its environments are built

    def _start(self, payload: bytes, start: int, stop: int, memory: int) -> None:
        ours, theirs = Pipe()
        command = [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(theirs.fileno()), str(memory)]
        with theirs:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory),
                env=os.environ | _ONE_THREAD,
                process_group=0,  # Ctrl-C in the terminal reaches the parent alone
            )
        self._processes.append(process)
        self._connections.append(ours)
        with contextlib.suppress(OSError):  # a worker that died at once is reported at the first receive
            ours.send_bytes(payload)
            ours.send((start, stop))

    def command(self, code: bytes) -> list[Any]:
        """Give all workers the same command and wait for them; returns what each one answered."""
        self._send(lambda connection, _: connection.send_bytes(code))
        return self._receive()

    def load(self, states: list[State]) -> None:
        """Give each worker the states of its slots."""

        def send(connection: Connection[Any, Any], worker: int) -> None:
            start, stop = self._ranges[worker]
            connection.send_bytes(LOAD)
            connection.send(states[start:stop])

        self._send(send)
        self._receive()

    def _send(self, send: Any) -> None:
        # An interrupt (Ctrl-C) may have cut an earlier wait short: its answers come first. At the start these
        # are the reports that the environments are built.
        self._receive()
        for worker, connection in enumerate(self._connections):
            self._pending[worker] += 1
            try:
                send(connection, worker)
            except OSError:
                self._raise_dead(worker)

    def _receive(self) -> list[Any]:
        answers: list[Any] = [None] * len(self._connections)
        for worker, connection in enumerate(self._connections):
            while self._pending[worker]:
                try:
                    code = connection.recv_bytes()
                    answers[worker] = connection.recv() if code != _DONE else None
                except (EOFError, OSError):
                    self._raise_dead(worker)
                self._pending[worker] -= 1
                if code == _REFUSED:
                    self.close()
                    raise SuiteError(answers[worker])
                if code == _FAILED:
                    self.close()
                    raise WorkerError(f"environment worker {worker} failed:\n{answers[worker]}")
        return answers

    def _raise_dead(self, worker: int) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[worker].wait(timeout=5)
        code = self._processes[worker].returncode
        self.close()
        start, stop = self._ranges[worker]
        raise WorkerError(
            f"environment worker {worker} (slots {start} to {stop - 1}) died with exit code {code}; "
            "its own messages are above"
        )


def _memory_folder() -> str | None:
    """A folder in memory where there is one, so that the shared arrays never touch a disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _shut_down(processes: list[subprocess.Popen[bytes]], connections: list[Connection[Any, Any]]) -> None:
    for connection in connections:
        connection.close()  # the worker reads the end of its commands and leaves
    for process in processes:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    """Entry point of a worker: build the chunk, then obey until the parent is gone."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[2]))
    with contextlib.suppress(EOFError, OSError):  # the parent is gone: nobody is left to tell
        try:
            spec, factory = pickle.loads(connection.recv_bytes())
            start, stop = connection.recv()
            memory = mmap.mmap(int(sys.argv[3]), Buffers.size(spec))
            chunk = Chunk(factory, spec, start, stop, Buffers.over(spec, memory))
            connection.send_bytes(_DONE)
            while True:
                _obey(chunk, connection.recv_bytes(), connection)
        except (EOFError, OSError):
            raise
        except SuiteError as error:
            connection.send_bytes(_REFUSED)
            connection.send(str(error))
        except Exception:
            connection.send_bytes(_FAILED)
            connection.send(traceback.format_exc())


def _obey(chunk: Chunk, code: bytes, connection: Connection[Any, Any]) -> None:
    if code == STATE:
        connection.send_bytes(_VALUE)
        connection.send(chunk.state())
        return
    if code == STEP:
        chunk.step()
    elif code == RESET:
        chunk.reset()
    elif code == LOAD:
        chunk.load_state(connection.recv())
    connection.send_bytes(_DONE)
