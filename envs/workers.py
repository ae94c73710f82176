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
import struct
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

# A message is one of these bytes, and for some of them a pickled value after it.
RESET, STEP, STATE, LOAD = b"r", b"s", b"g", b"l"
#: What follows STEP: first and last + 1 of the environments of every task to step.
STEP_RANGE = "<HH"
_DONE, _REFUSED, _FAILED = b"d", b"e", b"f"

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
            for _ in self._ranges:
                self._start(file.fileno())
        with contextlib.suppress(OSError):  # a worker that died at once is reported at the first receive
            for connection, (start, stop) in zip(self._connections, self._ranges, strict=True):
                connection.send_bytes(payload)
                connection.send((start, stop))
        self._pending = [1] * count  # every worker reports once when its environments are built

    def _start(self, memory: int) -> None:
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

    def command(self, code: bytes) -> list[Any]:
        """Give all workers the same command and wait for them; returns what each one answered."""
        return self._exchange([code] * len(self._connections))

    def post(self, code: bytes, go_on: bool) -> None:
        """Give all workers a command without waiting; ``go_on`` if others have been posted since the last wait."""
        self._post([code] * len(self._connections), drain=not go_on)

    def wait(self) -> None:
        """Wait until every worker has done what was posted."""
        self._receive()

    def load(self, states: list[State]) -> None:
        """Give each worker the states of its slots."""
        self._exchange([LOAD + pickle.dumps(states[start:stop]) for start, stop in self._ranges])

    def _exchange(self, messages: list[bytes]) -> list[Any]:
        self._post(messages, drain=True)
        return self._receive()

    def _post(self, messages: list[bytes], drain: bool) -> None:
        if not self.close.alive:
            raise RuntimeError("this engine is closed: make a new one")
        if drain:
            # An interrupt (Ctrl-C) may have cut an earlier wait short: its answers come first. At the start
            # these are the reports that the environments are built.
            self._receive()
        for worker, message in enumerate(messages):
            self._pending[worker] += 1
            try:
                self._connections[worker].send_bytes(message)
            except OSError:
                self._raise_dead(worker)

    def _receive(self) -> list[Any]:
        answers: list[Any] = [None] * len(self._connections)
        for worker, connection in enumerate(self._connections):
            while self._pending[worker]:
                try:
                    message = connection.recv_bytes()
                except (EOFError, OSError):
                    self._raise_dead(worker)
                self._pending[worker] -= 1
                answers[worker] = pickle.loads(message[1:]) if len(message) > 1 else None
                if not message.startswith(_DONE):
                    self.close()
                if message.startswith(_REFUSED):
                    raise SuiteError(answers[worker])
                if message.startswith(_FAILED):
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
        except Exception as error:
            connection.send_bytes(_report(error))
            return
        connection.send_bytes(_DONE)
        while True:
            message = connection.recv_bytes()
            try:
                answer = _DONE + _obey(chunk, message)
            except Exception as error:
                answer = _report(error)
            connection.send_bytes(answer)


def _obey(chunk: Chunk, message: bytes) -> bytes:
    code = message[:1]
    if code == STATE:
        return pickle.dumps(chunk.state())
    if code == STEP:
        chunk.step(*struct.unpack(STEP_RANGE, message[1:]))
    elif code == RESET:
        chunk.reset()
    elif code == LOAD:
        chunk.load_state(pickle.loads(message[1:]))
    return b""


def _report(error: Exception) -> bytes:
    if isinstance(error, SuiteError):
        return _REFUSED + pickle.dumps(str(error))
    return _FAILED + pickle.dumps("".join(traceback.format_exception(error)))
