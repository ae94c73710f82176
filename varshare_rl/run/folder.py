"""The folder of a run: held by one process at a time, and gone again where no run has begun in it."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from varshare_rl.errors import UserError
from varshare_rl.overrides import override
from varshare_rl.reading import check_folder
from varshare_rl.run_files import CHECKPOINTS, CONFIG_FILE, LOCK_FILE, METRICS_FILE, SUMMARY_FILE

#: Files of a run and of what was made of it, other than exports: gone when another run takes the folder.
RUN_FILES = (
    CONFIG_FILE, METRICS_FILE, "events.out.tfevents.*", "metrics.csv", "wandb_id.txt", "mlflow_id.txt", CHECKPOINTS,
    SUMMARY_FILE, "failure.txt", "sharing", "tasks", "evaluation*.json", "video", "video_best", "report_sharing",
    "report_continual", "calibration.json", "calibration.png",
)  # fmt: skip


def name_folder(run_dir: str | None, parts: Sequence[str], dated: bool) -> Path:
    """The folder of a run: ``run_dir``, or one below ``runs`` named by the ``parts`` and, if ``dated``, the time.

    Raises:
        UserError: ``run_dir`` is empty.
    """
    if run_dir is not None:
        if not run_dir:
            raise UserError("run_dir is empty; give a folder, or leave it out for runs/<name>")
        return Path(run_dir)
    return Path("runs") / "_".join([*parts, *([time.strftime("%Y%m%d-%H%M%S")] if dated else [])])


@contextmanager
def held_folder(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of a run folder; the system lets go of it when this process dies.

    Raises:
        UserError: another process holds it, it cannot be written, or links lead out of it.
    """
    check_folder(run_dir)
    path = run_dir / LOCK_FILE
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        owner = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        raise UserError(
            f"run folder {str(run_dir)!r} is in use by {owner or 'another process'}; wait for its end, or end it"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write into the run folder {str(run_dir)!r} ({error.strerror})") from error
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held, so that nobody can hold a file without a name
        lock.release()


@contextmanager
def new_folder(wanted: Path, numbered: bool, overwrite: bool = False) -> Iterator[Path]:
    """Make and hold the folder of a new run; what was made is removed unless there is a ``config.yaml`` in the end.

    Args:
        wanted: the folder; may be there if it holds no run.
        numbered: take ``<wanted>-2``, ``-3``, ... where it is there already.
        overwrite: remove the files of a run that it holds; others stay.

    Raises:
        UserError: it cannot be made, is in use, or holds a run.
    """
    with ExitStack() as stack:
        made = [folder for folder in wanted.parents if not folder.exists()]
        try:
            wanted.parent.mkdir(parents=True, exist_ok=True)
            run_dir, is_new = _make(wanted, numbered)
        except OSError as error:
            raise UserError(
                f"cannot make the run folder {wanted} ({error.strerror}); give another run_dir"
            ) from error
        finally:
            for folder in reversed(made):
                stack.callback(_remove_empty, folder)
        if is_new:
            stack.callback(_remove_empty, run_dir)
        stack.enter_context(held_folder(run_dir))
        if overwrite:
            for pattern in RUN_FILES:
                for path in run_dir.glob(pattern):
                    _remove(path)
        _refuse_run(run_dir)
        before = set(os.listdir(run_dir))
        try:
            yield run_dir
        finally:
            if not (run_dir / CONFIG_FILE).exists():
                for name in set(os.listdir(run_dir)) - before:
                    _remove(run_dir / name)


def _make(wanted: Path, numbered: bool) -> tuple[Path, bool]:
    """Make a folder; also returns whether it was not there before."""
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            if not numbered:
                wanted.mkdir(exist_ok=True)  # fails for a file
                return wanted, False
        else:
            return folder, True
    raise AssertionError


def _refuse_run(run_dir: Path) -> None:
    """Raise UserError if a folder holds a run; one killed as it started has neither configuration nor metrics."""
    metrics = run_dir / METRICS_FILE
    if not (run_dir / CONFIG_FILE).exists() and not (metrics.exists() and metrics.stat().st_size):
        return
    begun = (run_dir / CHECKPOINTS).is_dir() or (run_dir / SUMMARY_FILE).exists()
    cure = f"go on with {override('resume', run_dir)}" if begun else "it has no checkpoint to go on from: remove it"
    raise UserError(f"{run_dir} holds a run already; {cure}, or give another run_dir or overwrite=true")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # there is a run in it
        folder.rmdir()
