"""A whole training command in a process of its own, with what it cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench.contenders import Setting


@dataclass(frozen=True)
class Outcome:
    """``seconds`` of the whole command, its lines of ``metrics.jsonl``, and the memory of its processes."""

    seconds: float
    lines: list[dict[str, Any]]
    peak_gib: float  # proportional set size (shared pages divided), highest of the samples


def train(overrides: Sequence[str], setting: Setting, script: str = "") -> Outcome:
    """Run ``python -m varshare_rl.train`` with ``overrides`` and quiet logs; ``script`` is run before it."""
    threads = {"OMP_NUM_THREADS": str(setting.threads)} if setting.threads else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*overrides, "log.quiet=true", "device=cpu", f"run_dir={folder}/run"]
        code = (
            "import runpy, sys\n"
            + script
            + "\nrunpy.run_module('varshare_rl.train', run_name='__main__', alter_sys=True)"
        )
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], env=os.environ | threads, stdout=subprocess.DEVNULL
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _proportional_gib(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - begin
        if process.returncode != 0:
            raise RuntimeError(f"train {' '.join(overrides)} ended with code {process.returncode}")
        path = Path(folder) / "run" / "metrics.jsonl"
        return Outcome(seconds, [json.loads(line) for line in path.read_text().splitlines()], peak)


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
