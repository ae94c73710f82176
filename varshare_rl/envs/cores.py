"""The processor cores that this process may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def cores() -> list[frozenset[int]]:
    """Physical cores by their CPUs (hyper-threads), as far as this process may run on them."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings: dict[str, set[int]] = {}
    for cpu in sorted(allowed):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.setdefault(path.read_text() if path.exists() else str(cpu), set()).add(cpu)
    return [frozenset(cpus) for cpus in siblings.values()]


def physical_cores() -> int:
    """How many of them this process may keep busy: a cgroup's quota may allow fewer."""
    count = len(cores())
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            count = min(count, int(limit) // int(period))
    return max(1, count)


def keep_to(process: int, core: frozenset[int]) -> None:
    """Let a process run on one core alone, where the system can; nothing if it may not, or the process is gone."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(process, core)
