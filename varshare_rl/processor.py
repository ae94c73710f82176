"""What the operating system says of the processor."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def processor(field: str) -> str:
    """Return a field of ``/proc/cpuinfo``, such as ``model name``; of the first core, empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next(
        (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == field), ""
    )
