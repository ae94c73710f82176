"""Runs training commands in forks of this process, with signals at chosen moments: ``driver.py <scenarios.json>``.

A scenario is ``{"arguments": [...], "out": file, "fault": null or {"name", "target", "moment"}}``; the answer is a
line of JSON for each: its exit code, and the workers that were still there afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from varshare_rl.algorithms.actor_critic import ActorPolicy
from varshare_rl.algorithms.ppo import PPO
from varshare_rl.commands import train
from varshare_rl.envs.engine import SlotEngine
from varshare_rl.envs.workers import Workers
from varshare_rl.run import checkpoint
from varshare_rl.run.loop import Run

#: What is called at each moment, and which call of it is the moment: but at the start after the first checkpoint.
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "start": (Run, "start", 1),
    "step": (SlotEngine, "finish", 30),
    "update": (PPO, "update", 2),
    "evaluate": (ActorPolicy, "act", 25),
    "save": (checkpoint, "write_atomically", 3),
}


class Fault:
    """Sends a signal to this process, to its workers, or to both, once, when a moment has come."""

    def __init__(self, name: str, target: str, moment: str, notes: Path) -> None:
        self.number, self.target, self.notes = signal.Signals[name], target, notes
        self.workers: list[int] = []
        owner, method, self.calls = MOMENTS[moment]
        plain, start_worker = getattr(owner, method), Workers._start

        def at_the_moment(*arguments: Any, **options: Any) -> Any:
            self.calls -= 1
            if self.calls == 0:
                self.strike()
            return plain(*arguments, **options)

        def noting(workers: Workers) -> None:
            start_worker(workers)
            self.workers.append(workers.processes[-1].pid)
            notes.write_text(json.dumps(self.workers))

        setattr(owner, method, at_the_moment)
        Workers._start = noting  # type: ignore[method-assign]

    def strike(self) -> None:
        processes = {"parent": [os.getpid()], "workers": self.workers, "both": [*self.workers, os.getpid()]}
        if self.number is signal.SIGSTOP:
            names = " ".join(map(str, processes[self.target]))
            subprocess.Popen(["/bin/sh", "-c", f"sleep 0.3; kill -CONT {names}"])
        for process in processes[self.target]:
            os.kill(process, self.number)


def run(arguments: list[str], out: Path, fault: dict[str, str] | None) -> dict[str, Any]:
    notes = out.with_suffix(".workers")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with out.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if fault is not None:
                Fault(**fault, notes=notes)
            sys.argv = ["varshare_rl.train", *arguments]
            train.command()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    workers = json.loads(notes.read_text()) if notes.exists() else []
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return {"code": os.waitstatus_to_exitcode(status), "orphans": [pid for pid in workers if alive(pid)]}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    torch.set_num_threads(1)
    for scenario in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run(scenario["arguments"], Path(scenario["out"]), scenario["fault"])), flush=True)
