"""Whether memory that an update has freed goes back to the operating system."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_THRESHOLD = 32 << 20  # glibc takes no larger one
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees from now on; returns whether its C library knows how (glibc does).

    Activations of a few MB are allocated and freed at every update. By default glibc gives the top of its heap back
    and asks for it again, and the kernel clears every page anew: thousands of page faults an update. Blocks of
    more than 32 MB (replay memories) stay outside the heap. What was freed before the call goes back first.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    mallopt, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is None or trim is None:
        return False
    trim(0)
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
