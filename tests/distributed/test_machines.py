"""The commands and the Slurm script of docs/howto/machines.md, with a tiny budget on this machine."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY, TINY_ALGORITHM, last_of_each

import varshare_rl
from varshare_rl.reading import read_object

PROJECT = Path(varshare_rl.__file__).resolve().parent.parent
PAGE = (PROJECT / "docs" / "howto" / "machines.md").read_text(encoding="utf-8")
BUDGET = (*TINY, *TINY_ALGORITHM["ppo"], "log.trackers=[]", "total_transitions=640")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

pytestmark = pytest.mark.slow


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return [block.replace("\\\n", "") for block in found]


def cheaply(line: str, name: str) -> str:
    """The same start of two ranks on this machine, with a budget of few updates."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        here = f"127.0.0.1:{port.getsockname()[1]}"
    line = re.sub(r"--nnodes \d+", "--nnodes 1", re.sub(r"--nproc-per-node \d+", "--nproc-per-node 2", line))
    line = line.replace("<host>:29500", here).replace("$first:29500", here)
    start, _, options = line.partition("-m varshare_rl.train ")
    kept = [word for word in shlex.split(options) if word.startswith(("resume=", "tasks_per_rank="))]
    words = last_of_each((*BUDGET, *(word.replace("tasks_per_rank=13", "tasks_per_rank=4") for word in kept)))
    return f"{start}-m varshare_rl.train {shlex.join([*words, f'run_dir={name}'])}"


def assert_done(run: Path) -> None:
    summary = read_object(run / "summary.json")
    assert (summary["transitions"], summary["conditions"]["ranks"]) == (640, 2)


def test_the_commands(folder: Path) -> None:
    commands = blocks("bash")
    assert len(commands) == 3
    for number, command in enumerate(commands):
        line = cheaply(command.strip(), f"run{number}")
        done = subprocess.run(line, shell=True, env={**os.environ, "PATH": PATH}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert_done(folder / f"run{number}")


def test_the_slurm_script_by_submitit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit")
    (script,) = blocks("sh")
    head, begin, rest = script.partition("srun ")
    Path("job.sh").write_text(head + begin + cheaply(rest.strip(), "run") + "\n")
    for name, does in (("srun", 'exec "$@"'), ("scontrol", "echo localhost")):
        tool = folder / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{does}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{PATH}")
    for name, value in (("NUM_NODES", "1"), ("ID", "7"), ("NODELIST", "localhost")):
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    executor = submitit.LocalExecutor(folder / "jobs")
    executor.update_parameters(timeout_min=10)
    job = executor.submit(submitit.helpers.CommandFunction(["bash", "job.sh"], verbose=False))
    job.result()
    assert_done(folder / "run")
