"""The process that trains: random generators, threads, and memory that it has freed."""

from __future__ import annotations

import ctypes
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from varshare_rl.envs.division import physical_cores
from varshare_rl.errors import UserError
from varshare_rl.ranks import Ranks, join
from varshare_rl.types import Tree

MAX_SEED = 2**32 - 1  # the limit of numpy's global generator


def seed_everything(seed: int) -> None:
    """Seed Python's ``random``, numpy's global generator, and torch on the CPU and on every CUDA device.

    Raises :class:`UserError` for a seed outside 0 to 2**32 - 1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed={seed}: a seed is an integer from 0 to {MAX_SEED}; choose one in that range")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (packages that suites use draw from the global generator)
    torch.manual_seed(seed)


def available_memory() -> float:
    """Return the bytes that this process may still take, of the machine and of its control group; or inf."""
    left = float("inf")
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        left = 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError):  # the limit may be "max"
        group = Path("/sys/fs/cgroup")
        most, taken = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        left = min(left, float(most - taken))
    return left


def require_memory(size: float, what: str, cure: str) -> None:
    """Refuse what cannot fit into memory, before it is made.

    Raises:
        UserError: says what would take how many of how many bytes.
    """
    left = available_memory()
    if size > left:
        raise UserError(f"{what} would take {size / 1e9:,.1f} GB of memory, {left / 1e9:,.1f} GB are free; {cure}")


def rng_state() -> Tree:
    """Return the state of the generators that :func:`seed_everything` seeds, of CUDA that of the device in use."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {
        "python": {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": np.array(keys),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def load_rng_state(tree: Tree) -> None:
    """Put back what :func:`rng_state` returned.

    Of CUDA devices it is that of the one in use; where there is none, a run goes on, though not bit for bit.
    """
    python, numpy_state = tree["python"], tree["numpy"]
    random.setstate((python["version"], tuple(int(word) for word in python["words"]), python["gauss"]))
    np.random.set_state(  # noqa: NPY002
        (
            numpy_state["name"],
            numpy_state["keys"],
            numpy_state["position"],
            numpy_state["has_gauss"],
            numpy_state["cached"],
        )
    )
    torch.set_rng_state(tree["torch"])
    if tree["cuda"] and torch.cuda.is_available():  # former versions kept those of all devices, the first in use
        torch.cuda.set_rng_state(tree["cuda"][0])


def joined_ranks() -> Ranks:
    """Return the ranks that this process trains with, once all are there, and compute with as many threads as each.

    They are a rank's share of the machine's cores, or ``OMP_NUM_THREADS`` if that is more than the 1 that torchrun
    gives: results depend on the number, and replicas must not differ.

    Raises:
        UserError: they cannot be reached.
    """
    ranks = join()
    if ranks.size == 1:
        return ranks
    if os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]
    torch.set_num_threads(ranks.least(int(os.environ.get("OMP_NUM_THREADS", physical_cores()))))
    return ranks


@contextmanager
def own_random(seed: int | None = None) -> Iterator[None]:
    """Inside, every generator is seeded anew, or goes on where ``seed`` is None; outside all are as they were."""
    outside = rng_state()
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        load_rng_state(outside)


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


#: Multiplications from which on a product gains more by a second thread than it loses by waiting for it.
_WORTH_THREADS = 1 << 24


def threads_for(multiplications: int) -> int:
    """Return how many threads training should compute with whose largest product has so many multiplications.

    One where that is small: two are a fifth quicker alone, but every product waits for a thread whose core another
    process has. ``OMP_NUM_THREADS`` decides where it is set.
    """
    small = multiplications < _WORTH_THREADS and "OMP_NUM_THREADS" not in os.environ
    return 1 if small else torch.get_num_threads()


@contextmanager
def compute_threads(count: int) -> Iterator[None]:
    """Inside, torch computes with so many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread.

    The small products of acting gain nothing from more, and a thread that waits for another one that the
    environment workers have pushed off its core waits for milliseconds.
    """
    with compute_threads(1):
        yield
