"""Screens that cannot show or take what is printed: training goes on and saves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY, TINY_ALGORITHM

LOUD = [
    *(item for item in TINY if not item.startswith("log.quiet")), *TINY_ALGORITHM["ppo"], "total_transitions=160",
    "run_dir=run",
]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def test_a_reader_that_has_left_and_cannot_read_much(folder: Path) -> None:
    """The pipe is closed before anything is written, and its encoding has no middle dot."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "varshare_rl.train", *LOUD], stdout=write, stderr=subprocess.PIPE, text=True,
        env=environment(PYTHONIOENCODING="ascii"),
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("run/summary.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_full_disk_behind_the_screen(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "varshare_rl.train", *LOUD], stdout=full, stderr=subprocess.PIPE, text=True,
            env=environment(),
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("run/summary.json").exists()


@pytest.mark.slow
def test_ascii_and_forced_colours_in_a_file(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "varshare_rl.train", *LOUD], capture_output=True,
        env=environment(PYTHONIOENCODING="ascii", FORCE_COLOR="1"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert b"pointmass ? ppo ? varshare_lora" in done.stdout
    assert b"\x1b" not in done.stdout


SCRIPT = "import sys; from varshare_rl.entry import LastingStream; sys.stdout = LastingStream(sys.stdout); {}"


@pytest.mark.parametrize("out", ["/dev/full", "closed"])
def test_what_cannot_be_written_is_dropped_up_to_the_last_flush(out: str) -> None:
    if out == "closed":
        read, write = os.pipe()
        os.close(read)
    elif Path(out).exists():
        write = os.open(out, os.O_WRONLY)
    else:
        pytest.skip("this system has no full device")
    code = SCRIPT.format("[print('x' * 1000) for _ in range(100)]; sys.stdout.flush(); print('end')")
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_screen_at_all() -> None:
    code = SCRIPT.format("print('x'); sys.exit(sys.stdout.isatty())")
    assert subprocess.run(["/bin/sh", "-c", f'exec "$0" -c "{code}" >&-', sys.executable]).returncode == 0
