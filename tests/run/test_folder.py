"""The folder of a run: made, held, refused, and gone where no run has begun."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from varshare_rl.errors import Terminated, UserError
from varshare_rl.run.folder import held_folder, new_folder
from varshare_rl.run_files import CONFIG_FILE, LOCK_FILE


def test_one_at_a_time_and_the_owner_is_named(tmp_path: Path) -> None:
    owner = rf"in use by process {os.getpid()} on {socket.gethostname()}"
    with held_folder(tmp_path):
        with pytest.raises(UserError, match=owner), held_folder(tmp_path):
            pass
        with pytest.raises(UserError, match=owner), new_folder(tmp_path, numbered=False):
            pass
    with held_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_owner_left_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("process 1 on elsewhere\n")
    with held_folder(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


def test_starts_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "name"
    with new_folder(wanted, numbered=True) as one, new_folder(wanted, numbered=True) as other:
        assert [one.name, other.name] == ["name", "name-2"]
        for folder in (one, other):
            (folder / CONFIG_FILE).touch()
    with new_folder(wanted, numbered=True) as third:
        assert third.name == "name-3"
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["name", "name-2"]


def fail_in(folder: Path, error: type[BaseException]) -> None:
    with new_folder(folder, numbered=False) as run_dir:
        (run_dir / "metrics.jsonl").touch()
        (run_dir / "checkpoints" / "last-0").mkdir(parents=True)
        raise error


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt, Terminated])
def test_a_start_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    for folder in (tmp_path / "runs" / "deep" / "new", mine):
        with pytest.raises(error):
            fail_in(folder, error)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "notes.txt"]


def test_a_start_that_was_killed_does_not_block_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints" / "last-000000000000").mkdir(parents=True)
    with new_folder(tmp_path, numbered=False):
        pass


@pytest.mark.parametrize(
    ("files", "cure"),
    [
        ((CONFIG_FILE, "checkpoints/last/x"), "go on with 'resume=.*name with spaces"),
        ((CONFIG_FILE,), "it has no checkpoint to go on from: remove it"),
    ],
)
def test_a_run_is_not_overwritten_and_the_cure_is_one(tmp_path: Path, files: tuple[str, ...], cure: str) -> None:
    run_dir = tmp_path / "name with spaces"
    for file in files:
        (run_dir / file).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / file).touch()
    with pytest.raises(UserError, match=f"holds a run already; {cure}"), new_folder(run_dir, numbered=False):
        pass
    assert (run_dir / CONFIG_FILE).exists()
