"""A whole command in a process of its own, with what it cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.bench.contenders import Setting


@dataclass(frozen=True)
class Outcome:
    """``seconds`` of a command and the memory of its processes; of training its lines of ``metrics.jsonl``."""

    seconds: float
    peak_gib: float  # proportional set size (shared pages divided), highest of the samples
    lines: list[dict[str, Any]]


def train(overrides: Sequence[str], setting: Setting, script: str = "", ranks: int = 1) -> Outcome:
    """Run ``python -m varshare_rl.train`` with ``overrides`` and quiet logs; ``script`` is run before it.

    Of several ``ranks`` torchrun is run in its place.
    """
    with tempfile.TemporaryDirectory() as folder:
        module = "runpy.run_module('varshare_rl.train', run_name='__main__', alter_sys=True)"
        if ranks > 1:
            words = ["torchrun", "--nproc-per-node", str(ranks), "-m", "varshare_rl.train"]
            script = f"sys.argv[:1] = {words}"
            module = "runpy.run_module('torch.distributed.run', run_name='__main__', alter_sys=True)"
        arguments = [*overrides, "log.quiet=true", "device=cpu", f"run_dir={folder}/run"]
        outcome = python(f"import runpy, sys\n{script}\n{module}", setting, arguments)
        path = Path(folder) / "run" / "metrics.jsonl"
        return replace(outcome, lines=[json.loads(line) for line in path.read_text().splitlines()])


def python(code: str, setting: Setting, arguments: Sequence[str] = ()) -> Outcome:
    """Run ``code`` in a Python of its own."""
    threads = {"OMP_NUM_THREADS": str(setting.threads)} if setting.threads else {}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=os.environ | threads, stdout=subprocess.DEVNULL
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _proportional_gib(process.pid))
        time.sleep(0.25)  # to look takes a while itself where much memory is shared
    seconds = time.perf_counter() - begin
    if process.returncode != 0:
        raise RuntimeError(
            f"python -c {code.splitlines()[-1]!r} {' '.join(arguments)} ended with {process.returncode}"
        )
    return Outcome(seconds, peak, [])


def _proportional_gib(pid: int) -> float:
    """Memory of a process and its descendants: what they share is counted once."""
    kib, family = 0, [pid]
    while family:
        member = Path(f"/proc/{family.pop()}")
        try:
            family += [int(child) for child in (member / f"task/{member.name}/children").read_text().split()]
            lines = (member / "smaps_rollup").read_text().splitlines()
            kib += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):  # gone meanwhile
            continue
    return kib / 2**20
