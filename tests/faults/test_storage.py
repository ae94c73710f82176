"""A full disk is waited for, and ends nothing but the run; a replay in a file is the same as one in memory."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM, last_of_each
from test_resume import assert_same, final_state, metrics

from varshare_rl import files
from varshare_rl.data.buffers import ReplayBuffer
from varshare_rl.run import checkpoint
from varshare_rl.run.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from varshare_rl.types import Transition

RUN = last_of_each((
    *TINY, *TINY_ALGORITHM["sac"], "log.trackers=[]", "log.every=80", "checkpoint.every=160",
    "checkpoint.minutes=0", "total_transitions=480",
))  # fmt: skip


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust() -> RuntimeError:
    return RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, calls: set[int], error: Callable[[], Exception]) -> None:
    """Have a function of the checkpoints fail in some of its calls."""
    plain, count = getattr(checkpoint, name), 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            raise error()
        return plain(*arguments, **options)

    monkeypatch.setattr(checkpoint, name, failing)


def assert_undisturbed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert command("train", *RUN, "run_dir=whole").code == 0
    assert_same(final_state(Path("run")), final_state(Path("whole")))
    assert metrics(Path("run")) == metrics(Path("whole"))


@pytest.mark.parametrize(
    ("name", "error"), [("save_file", full_in_rust), ("write_atomically", full), ("sync_folder", full)]
)
def test_a_full_disk_is_waited_for_while_saving(
    command: Command, monkeypatch: pytest.MonkeyPatch, name: str, error: Callable[[], Exception]
) -> None:
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    fail_at(monkeypatch, name, {4, 5}, error)
    outcome = command("train", *RUN, "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("warning: the disk of run is full (") == 1
    assert "; waiting for room, 30 minutes at most" in outcome.out
    assert outcome.out.count("there is room again in run; going on") == 1
    assert_undisturbed(command, monkeypatch)


def test_a_disk_that_stays_full_ends_the_run_with_its_last_checkpoint(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, "save_file", set(range(3, 100)), full_in_rust)
        outcome = command("train", *RUN, "run_dir=run", "checkpoint.wait_minutes=0")
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: the disk of run is full (")
    assert line.endswith("make room; go on from the last checkpoint with python -m varshare_rl.train resume=run")
    assert newest_checkpoint(Path("run"))[1]["transitions"] == 160
    assert not list(Path("run/checkpoints").glob(".*"))
    assert command("train", "resume=run").code == 0
    assert_undisturbed(command, monkeypatch)


def test_a_log_waits_for_room_too(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    real, free = files.shutil.disk_usage, [files.LEAST_FREE, 1000, 1000, 1000, 1000]

    def disk_usage(folder: Path) -> Any:
        return real(folder)._replace(free=free.pop(0) if free else 10**9)

    monkeypatch.setattr(files.shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    outcome = command("train", *RUN, "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("waiting for room") == outcome.out.count("there is room again") == 1
    assert_undisturbed(command, monkeypatch)


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mounted, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a file system here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fills up before the third checkpoint, and somebody makes room while the run waits."""
    filler, plain, count = small_disk / "filler", checkpoint._write, 0

    def filled(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(1000))
        return plain(*arguments)

    monkeypatch.setattr(checkpoint, "_write", filled)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: filler.unlink())
    outcome = command("train", *RUN, "run_dir=disk/run")
    assert outcome.code == 0, outcome.err
    assert "warning: the disk of disk/run is full (0.0 MB free)" in outcome.out
    assert not filler.exists()
    monkeypatch.undo()
    assert command("train", *RUN, "run_dir=whole").code == 0
    assert_same(final_state(small_disk / "run"), final_state(Path("whole")))


def test_a_replay_in_a_file_is_the_same_to_the_bit(command: Command, folder: Path) -> None:
    Path("room").mkdir()
    half = [item for item in RUN if not item.startswith("total_transitions")]
    outcome = command("train", *half, "algorithm.replay_folder=room", "total_transitions=240", "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert command("train", "resume=run", "total_transitions=480").code == 0
    assert list(Path("room").iterdir()) == []  # it has no name, and is gone with the process
    assert command("train", *half, "total_transitions=240", "run_dir=whole").code == 0
    assert command("train", "resume=whole", "total_transitions=480").code == 0
    assert_same(final_state(Path("run")), final_state(Path("whole")))


def test_a_replay_folder_must_be_there_and_have_room(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = command("train", *RUN, "algorithm.replay_folder=nowhere")
    assert outcome.code == 2
    assert outcome.err == "error: algorithm.replay_folder is nowhere, which is no folder; give one that is there\n"

    def refuse(*_: object) -> None:
        raise full()

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    outcome = command("train", *RUN, "algorithm.replay_folder=.")
    assert outcome.code == 2
    assert outcome.err == "error: algorithm.replay_folder=. cannot hold 0.0 GB (No space left on device)\n"
    assert list(folder.iterdir()) == []


def in_a_fork(action: Callable[[], None]) -> None:
    """Do it in a process of its own, whose memory can be measured."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("mapped", [False, True])
def test_a_replay_is_saved_without_a_copy_in_memory(tmp_path: Path, mapped: bool) -> None:
    """120 MB of a replay that is half full."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    def save() -> None:
        replay = ReplayBuffer(2, 150_000, 48, 2, torch.device("cpu"), str(tmp_path) if mapped else None)
        ones = torch.ones(2, 75_000, 48)
        replay.add(Transition(ones, ones[..., :2], ones[..., 0], ones[..., 0] > 0, ones[..., 0] > 0, ones))
        before = peak()
        save_checkpoint(tmp_path, "last", 1, {"replay": replay.state()})
        assert peak() - before < 40, f"{before} MB, then {peak()} MB"

    in_a_fork(save)
    rows = load_checkpoint(tmp_path / "checkpoints" / "last-000000000001")["replay"]["rows"]
    assert [row.shape for row in rows] == [(75_000, 100)] * 2
    assert float(rows[1].mean()) == 1.0


def test_a_replay_of_former_checkpoints_is_read() -> None:
    replay = ReplayBuffer(2, 5, 1, 1, torch.device("cpu"))
    rows = torch.arange(2 * 3 * 5).view(2, 3, 5).float()
    replay.load_state({"position": 3, "filled": 3, "rows": rows})
    assert torch.equal(replay.rows[:, :3], rows)
