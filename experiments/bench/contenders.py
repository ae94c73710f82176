"""Contenders: each in a process of its own, so that none warms, patches or slows another, run in turn."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

import torch


@dataclass(frozen=True)
class Setting:
    """How long and with what a contender measures."""

    quick: bool = False
    threads: int = 0  # 0: as many as torch takes

    def pick(self, full: int, quick: int) -> int:
        """A size, smaller when quick."""
        return quick if self.quick else full


#: Does the work of one round and returns its result (seconds, or steps per second).
Round = Callable[[], float]

#: Builds a contender; what it does before it returns is not measured.
Contender = Callable[[Setting], Round]


@dataclass
class _Process:
    """A contender at the other end of two pipes, of a ``module`` with a table ``CONTENDERS``."""

    module: str
    name: str
    setting: Setting
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        arguments = [self.module, self.name, str(int(self.setting.quick)), str(self.setting.threads)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.bench.contenders", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> float:
        """Wait for the next number."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"contender {self.name!r} of {self.module} died; its own messages are above")
        return float(line)

    def round(self) -> float:
        """One round."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(module: str, names: Sequence[str], rounds: int, setting: Setting) -> dict[str, list[float]]:
    """Results of ``rounds`` rounds of every contender of a module, after one round that does not count.

    Each round visits all contenders; the one that begins moves on, so that no one always follows the same.
    """
    processes: list[_Process] = []
    try:
        for name in names:
            processes.append(_Process(module, name, setting))
            processes[-1].answer()  # built; one after the other, or they would measure each other's start
        results: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds + 1):
            first = number % len(processes)
            for process in processes[first:] + processes[:first]:
                value = process.round()
                if number > 0:
                    results[process.name].append(value)
        return results
    finally:
        for process in processes:
            process.close()


def serve(module: str, name: str, setting: Setting, answers: TextIO) -> None:
    """The contender's side: build it, then one round for every line on standard input."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    contenders: dict[str, Contender] = importlib.import_module(module).CONTENDERS
    work = contenders[name](setting)
    print(0.0, file=answers, flush=True)
    for _ in sys.stdin:
        print(work(), file=answers, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not be taken for an answer
    serve(sys.argv[1], sys.argv[2], Setting(sys.argv[3] == "1", int(sys.argv[4])), answers)
