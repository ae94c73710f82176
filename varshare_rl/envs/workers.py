"""Worker processes that step chunks of slots, over shared memory.

Workers are plain interpreters, not forks and not ``multiprocessing`` children: a fork would copy a parent
with running threads, and ``spawn`` would import the parent's main module (and torch with it) again. Commands
are a few bytes over a socket pair, which the operating system closes when either side dies; arrays go through
an anonymous shared file, whose descriptor goes over the socket, too.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

from varshare_rl.envs.division import cores, keep_to
from varshare_rl.envs.slots import Buffers, Chunk, EngineSpec, EnvironmentFailure, TaskEnvFactory
from varshare_rl.envs.suite import State
from varshare_rl.errors import EpisodePlace, RunFailure, UserError

# A message is one of these bytes, the number of an engine, and for some of them a value after it.
OPEN, RESET, STEP, STATE, LOAD, CLOSE = b"o", b"r", b"s", b"g", b"l", b"c"
_ENGINE = struct.Struct("<I")
#: What follows STEP: first and last + 1 of the environments of every task to step.
STEP_RANGE = "<HH"
_DONE, _REFUSED, _FAILED = b"d", b"e", b"f"

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from varshare_rl.envs.workers import main; main()"

#: One thread per worker: the workers are the parallelism.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

#: What stops a run: the user, a scheduler, and a terminal that is closed, unless that is ignored (``nohup``).
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Seconds that a worker may take to answer: for a step of each of its environments, or to build them all.
PATIENCE = 900


class WorkerError(RunFailure):
    """A worker process died or did not answer. The message names its tasks."""


class Workers:
    """Processes that the engines of one suite share: what they import and compile is there once.

    They start with the first engine that wants them, more of them with one that wants more, and end with the last.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self.processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection[Any, Any]] = []
        self._pending: list[int] = []  # answers that each worker still owes
        self._tasks: dict[int, list[str]] = {}  # that each worker has environments of
        self._stop: weakref.finalize[Any, Any] | None = None
        self._engines: dict[int, tuple[EngineSpec, Buffers, list[list[int]]]] = {}  # with the slots of each worker
        self._numbers = itertools.count()

    def open(self, factory: TaskEnvFactory, spec: EngineSpec, parts: list[list[int]]) -> WorkerPool:
        """Give each of the first workers its part of an engine's slots; they build them side by side."""
        try:
            payload = pickle.dumps((spec, factory))
        except Exception as error:
            raise UserError(
                f"workers={len(parts)} needs environments that other processes can import ({error}); use workers=1"
            ) from error
        if self._stop is None or not self._stop.alive:
            self.processes, self._connections, self._pending, self._engines = [], [], [], {}
            self._stop = weakref.finalize(self, _shut_down, self.processes, self._connections)
        places = cores()
        while len(self.processes) < len(parts):
            self._start()
            if len(parts) == len(places):
                # With a worker for every core the scheduler has nowhere to put this process, and often has two
                # workers take turns on one core while another is idle.
                keep_to(self.processes[-1].pid, places[len(self.processes) - 1])
        number = next(self._numbers)
        with tempfile.TemporaryFile(dir=_memory_folder()) as file:
            file.truncate(Buffers.size(spec))
            buffers = Buffers.over(spec, mmap.mmap(file.fileno(), Buffers.size(spec)))
            self._engines[number] = spec, buffers, parts
            with contextlib.suppress(OSError):  # a worker that died at once is reported at the first receive
                for worker, part in enumerate(parts):
                    self._tasks[worker] = list(dict.fromkeys(spec.task_name(slot) for slot in part))
                    self._pending[worker] += 1
                    connection = self._connections[worker]
                    connection.send_bytes(OPEN + _ENGINE.pack(number) + pickle.dumps(part))
                    connection.send_bytes(payload)
                    send_handle(connection, file.fileno(), self.processes[worker].pid)
        return WorkerPool(self, number, parts, buffers)

    def _start(self) -> None:
        ours, theirs = Pipe()
        command = [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(theirs.fileno())]
        # A signal to the whole job is the parent's to answer: it waits until the worker has learnt to ignore it.
        with theirs, _held_back():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=os.environ | _ONE_THREAD,
                process_group=0,  # Ctrl-C in the terminal reaches the parent alone
            )
        self.processes.append(process)
        self._connections.append(ours)
        self._pending.append(0)

    def has(self, number: int) -> bool:
        """Return True if an engine is open and its workers are there."""
        return self._stop is not None and self._stop.alive and number in self._engines

    def release(self, number: int) -> None:
        """Let go of an engine; with the last one the processes end."""
        if not self.has(number):
            return
        self._engines.pop(number)
        if not self._engines:
            self.shut_down()
            return
        with contextlib.suppress(UserError, RunFailure):  # somebody else's failure, met by who is next to ask
            self.post([CLOSE + _ENGINE.pack(number)] * len(self.processes), drain=True)
            self.receive()

    def shut_down(self) -> None:
        """End all processes; every engine is closed from then on."""
        if self._stop is not None:
            self._stop()

    def post(self, messages: list[bytes], drain: bool) -> None:
        """Send a message to each of the first workers without waiting; ``drain``: after all earlier answers."""
        if drain:
            # An interrupt (Ctrl-C) may have cut an earlier wait short: its answers come first. At the start
            # these are the reports that the environments are built.
            self.receive()
        for worker, message in enumerate(messages):
            self._pending[worker] += 1
            try:
                self._connections[worker].send_bytes(message)
            except OSError:
                self._raise_dead(worker)

    def receive(self) -> list[Any]:
        """Wait for all answers that are due; returns each worker's latest."""
        answers: list[Any] = [None] * len(self._connections)
        for worker, connection in enumerate(self._connections):
            while self._pending[worker]:
                self._await(worker)
                try:
                    message = connection.recv_bytes()
                except (EOFError, OSError):
                    self._raise_dead(worker)
                self._pending[worker] -= 1
                answers[worker] = pickle.loads(message[1:]) if len(message) > 1 else None
                if not message.startswith(_DONE):
                    self.shut_down()
                if message.startswith(_REFUSED):
                    raise UserError(answers[worker])
                if message.startswith(_FAILED):
                    raise EnvironmentFailure(*answers[worker])
        return answers

    def _await(self, worker: int) -> None:
        """Wait until a worker says something, or is dead."""
        waiting = select.poll()
        waiting.register(self._connections[worker], select.POLLIN)
        # In seconds of this process's own, so that one that was stopped with its workers does not blame them.
        left = self.patience
        while not waiting.poll(1000 * min(left, 1.0)):
            left -= 1.0
            if left <= 0:
                self.processes[worker].kill()
                self.shut_down()
                doing, episode = self._doing(worker)
                raise WorkerError(
                    f"environment worker {worker} did not answer for {self.patience:g} s; {doing}", episode=episode
                )

    def _doing(self, worker: int) -> tuple[str, EpisodePlace | None]:
        """Say what a worker is at, or else which tasks it has; and in which training episode, if that is known."""
        for spec, buffers, parts in self._engines.values():
            for slot in parts[worker] if worker < len(parts) else ():
                if buffers.busy[slot]:
                    index = int(buffers.busy[slot]) - 1
                    where = f"environment {spec.place(slot)[1]}, episode {index}"
                    return f"it was in task {spec.task_name(slot)} ({where})", spec.training_episode(slot, index)
        tasks = self._tasks.get(worker, [])
        more = f" and {len(tasks) - 5} more" if len(tasks) > 5 else ""
        return f"it steps task {', '.join(tasks[:5])}{more}", None

    def _raise_dead(self, worker: int) -> None:
        process = self.processes[worker]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        code = process.returncode
        self.shut_down()
        doing, episode = self._doing(worker)
        raise WorkerError(
            f"environment worker {worker} died with exit code {code}; {doing}; its own messages are above",
            episode=episode,
        )


class WorkerPool:
    """The workers of one engine, each with its part of the slots. Made by :meth:`Workers.open`."""

    def __init__(self, workers: Workers, number: int, parts: list[list[int]], buffers: Buffers) -> None:
        self.buffers = buffers
        self._workers, self._number, self._parts = workers, number, parts
        self.close = weakref.finalize(self, workers.release, number)

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """The processes that have a part of this engine."""
        return self._workers.processes[: len(self._parts)]

    def command(self, code: bytes) -> list[Any]:
        """Give all workers the same command and wait for them; returns what each one answered."""
        self.post(code, go_on=False)
        return self._workers.receive()[: len(self._parts)]

    def states(self) -> list[State]:
        """The states of all slots, in their order."""
        states: dict[int, State] = {}
        for part, answers in zip(self._parts, self.command(STATE), strict=True):
            states.update(zip(part, answers, strict=True))
        return [states[slot] for slot in sorted(states)]

    def post(self, code: bytes, go_on: bool) -> None:
        """Give all workers a command without waiting; ``go_on`` if others have been posted since the last wait."""
        message = code[:1] + _ENGINE.pack(self._number) + code[1:]
        self._post([message] * len(self._parts), drain=not go_on)

    def wait(self) -> None:
        """Wait until every worker has done what was posted."""
        self._workers.receive()

    def load(self, states: list[State]) -> None:
        """Give each worker the states of its slots."""
        head = LOAD + _ENGINE.pack(self._number)
        messages = [head + pickle.dumps([states[slot] for slot in part]) for part in self._parts]
        self._post(messages, drain=True)
        self._workers.receive()

    def _post(self, messages: list[bytes], drain: bool) -> None:
        if not self._workers.has(self._number):
            raise RuntimeError("this engine is closed: make a new one")
        self._workers.post(messages, drain)


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


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Inside, signals to stop wait, in this thread and in processes that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_stopping() -> None:
    """Ignore signals to stop, but let processes that environments start have them."""
    for number in STOPPING:
        signal.signal(number, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def main() -> None:
    """Entry point of a worker: build chunks and obey until the parent is gone."""
    _ignore_stopping()
    connection: Connection[Any, Any] = Connection(int(sys.argv[2]))
    chunks: dict[int, Chunk] = {}
    with contextlib.suppress(EOFError, OSError):  # the parent is gone: nobody is left to tell
        while True:
            message = connection.recv_bytes()
            try:
                answer = _DONE + _obey(chunks, connection, message)
            except Exception as error:
                answer = _report(error)
            connection.send_bytes(answer)


def _obey(chunks: dict[int, Chunk], connection: Connection[Any, Any], message: bytes) -> bytes:
    code, number, rest = message[:1], _ENGINE.unpack_from(message, 1)[0], message[1 + _ENGINE.size :]
    if code == STEP:
        chunks[number].step(*struct.unpack(STEP_RANGE, rest))
    elif code == OPEN:
        payload, memory = connection.recv_bytes(), recv_handle(connection)
        try:
            spec, factory = _unpickle(payload)
            buffers = Buffers.over(spec, mmap.mmap(memory, Buffers.size(spec)))
        finally:
            os.close(memory)
        chunks[number] = Chunk(factory, spec, pickle.loads(rest), buffers)
    elif code == STATE:
        return pickle.dumps(chunks[number].state())
    elif code == RESET:
        chunks[number].reset()
    elif code == LOAD:
        chunks[number].load_state(pickle.loads(rest))
    elif code == CLOSE and number in chunks:
        chunks.pop(number).close()
    return b""


def _unpickle(payload: bytes) -> Any:
    try:
        return pickle.loads(payload)
    except Exception as error:
        raise UserError(
            f"a worker process cannot import the environments ({error}): put what makes them into a module of its "
            "own, or use workers=1"
        ) from error


def _report(error: Exception) -> bytes:
    if isinstance(error, UserError):
        return _REFUSED + pickle.dumps(str(error))
    message = str(error) if isinstance(error, RunFailure) else f"{type(error).__name__}: {error}"
    details = "".join(traceback.format_exception(error))
    return _FAILED + pickle.dumps((message, details, getattr(error, "episode", None)))
