"""Files that are either whole or absent, and JSON that every reader accepts."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from varshare_rl.errors import RunFailure, UserError

T = TypeVar("T")

#: Bytes that a disk must have free for a log to be written.
LEAST_FREE = 4 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(RunFailure):
    """A disk has been full for too long."""


@dataclass(frozen=True)
class Patience:
    """Waits, where a disk is full, until there is room.

    Attributes:
        minutes: how long.
        say: what to call with a line when it begins to wait, and when it goes on.
        stop: ends the waiting at once where it says so.
    """

    minutes: float = 0.0
    say: Callable[[str], None] = lambda line: None
    stop: Callable[[], bool] = lambda: False
    poll_seconds: float = 0.5

    def __call__(self, action: Callable[[], T], folder: Path) -> T:
        """Do it again and again while the disk of ``folder`` is full.

        Raises:
            DiskFull: there was no room in all the time.
        """
        ends: float | None = None
        while True:
            try:
                done = action()
            except Exception as error:
                if not is_full(error):
                    raise
                left = f"the disk of {folder} is full ({shutil.disk_usage(folder).free / 1e6:,.1f} MB free)"
                if ends is None:
                    ends = time.monotonic() + 60 * self.minutes
                    self.say(f"warning: {left}; waiting for room, {self.minutes:g} minutes at most")
                if time.monotonic() >= ends or self.stop():
                    raise DiskFull(f"{left}; make room") from error
                time.sleep(self.poll_seconds)
            else:
                if ends is not None:
                    self.say(f"there is room again in {folder}; going on")
                return done

    def for_logs(self, folder: Path) -> None:
        """Wait until there is room for a line of a log and its pictures."""
        self(lambda: _require_free(folder), folder)


def _require_free(folder: Path) -> None:
    if shutil.disk_usage(folder).free < LEAST_FREE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_full(error: BaseException) -> bool:
    """Return True for an error that says that a disk, or somebody's share of it, is full."""
    number = error.errno if isinstance(error, OSError) else None
    return number in _FULL or any(f"(os error {full})" in str(error) for full in _FULL)  # safetensors'


def write_atomically(path: Path | str, content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) so that ``path`` holds the old content or all of the new, never less.

    The bytes go to a hidden file in the same folder, reach the disk, and are then renamed over ``path``.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def whole_folder(target: Path | str) -> Iterator[Path]:
    """Gives a hidden folder beside ``target`` to write into; it becomes ``target`` when the block ends well.

    A folder that stands there already is replaced, and stays if the block fails.

    Raises:
        UserError: the folder cannot be made.
    """
    target = Path(target).absolute()
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot make the folder {target} ({error.strerror}); give another") from error
    aside = hidden.with_suffix(".old")
    try:
        yield hidden
        for path in (*hidden.rglob("*"), hidden):
            sync_folder(path)
        os.chmod(hidden, 0o777 & ~_umask())
        if target.is_dir():
            target.rename(aside)
        hidden.rename(target)
    except BaseException:
        if aside.is_dir() and not target.exists():
            aside.rename(target)
        shutil.rmtree(hidden, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # another has put something there since
                parent.rmdir()
        raise
    if aside.is_dir():
        shutil.rmtree(aside)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make a file's bytes or a folder's names durable: else a rename may be lost when the machine goes down."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any, indent: int | None = None) -> str:
    """Return ``value`` as standard JSON; NaN and infinities, which JSON lacks, become ``null``.

    Takes dicts, lists, tuples, str, int, float, bool, None, paths, numpy scalars and arrays.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` to ``path`` atomically, indented, as :func:`to_json` puts it."""
    write_atomically(path, to_json(value, indent=2) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
