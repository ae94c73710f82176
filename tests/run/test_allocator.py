"""Memory that was freed is there for the next update."""

from __future__ import annotations

import subprocess
import sys

import pytest

_FAULTS = """
import resource
import numpy as np
from varshare_rl.run.process import keep_freed_memory

def faults():
    '''Pages that the kernel had to give while four arrays of 4 MB came and went 20 times.'''
    for count in (2, 20):  # the first ones settle what the allocator has
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(count):
            arrays = [np.ones(1 << 19) for _ in range(4)]
            del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
assert keep_freed_memory()
print(before, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is asked")
def test_freed_pages_are_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 10_000  # pages are cleared anew, 4096 of them hold the arrays: what keeps this test honest
    assert after < 200
