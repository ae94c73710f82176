"""Checkpoints: folders ``checkpoints/<kind>-<transitions>/`` of ``state.json`` and ``tensors.safetensors``.

``state.json`` is the tree as readable JSON, with a reference in place of each tensor, and the size and
SHA-256 of the tensor file. A checkpoint is written under a hidden name, brought to disk, and renamed; only
then are older ones of its kind deleted, but for those that are to stay. Nothing is pickled, so loading runs no
code.

Where several ranks train, the tree says how many (``ranks``), and ``rank-<n>/`` has in the same form what each of
the others has of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from varshare_rl.errors import UserError, one_line
from varshare_rl.files import Patience, sync_folder, write_atomically
from varshare_rl.ranks import ALONE, Ranks
from varshare_rl.reading import STUMBLES, read_object
from varshare_rl.run_files import CHECKPOINTS
from varshare_rl.types import Tree

FORMAT_VERSION = 1
STATE_FILE = "state.json"
TENSOR_FILE = "tensors.safetensors"

_MOST_RANKS = 10_000
_HIDDEN = ".unfinished-"
_REPLACED = ".replaced"  # a checkpoint on its way out, still complete, while one of the same name comes in
_NAME = re.compile(rf"(?P<kind>[a-z]+)-(?P<transitions>\d{{12,}})(?P<replaced>{re.escape(_REPLACED)})?")


class CheckpointError(UserError):
    """A checkpoint is missing or damaged. The message is one line for the user."""


def save_checkpoint(
    run_dir: Path,
    kind: str,
    transitions: int,
    tree: Tree,
    keep: int = 1,
    ranks: Ranks = ALONE,
    patience: Patience = Patience(),  # noqa: B008
) -> Path:
    """Write ``tree`` as checkpoint ``<kind>-<transitions>`` of a run and return its folder.

    It and those before it of its kind stay, ``keep`` in all. The tree of ``ranks`` other than the first is what
    they have of their own, or empty; then they write nothing, else the first's says how many there are (``ranks``).

    Leaves of the tree: Tensor (comes back on the CPU), ndarray, numpy scalar, int, float, str, bool, None;
    nodes: dict with str or int keys, list, tuple. Everything comes back with its type, dtype and every bit,
    except that tensors which shared memory no longer do. At any moment of the call at least one complete
    checkpoint of this kind is on disk, if there was one before. Raises TypeError, naming the place, for any
    other leaf.
    """
    folder = run_dir / CHECKPOINTS
    hidden, target = folder / f"{_HIDDEN}{kind}-{transitions:012d}", folder / f"{kind}-{transitions:012d}"
    part = _part(hidden, ranks.rank)
    ranks.from_first(lambda: patience(lambda: _begin(folder, hidden), run_dir))
    try:
        ranks.together(lambda: patience(lambda: _write(part, kind, transitions, tree), run_dir) if tree else None)
        ranks.from_first(lambda: patience(lambda: _finish(folder, hidden, target, keep), run_dir))
    except Exception:
        if ranks.first:
            shutil.rmtree(hidden, ignore_errors=True)
        raise
    return target


def _begin(folder: Path, hidden: Path) -> None:
    """Make the hidden folder of a checkpoint, after what is left of one that was not finished is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(_HIDDEN + "*"):
        shutil.rmtree(leftover)
    hidden.mkdir()


def _write(part: Path, kind: str, transitions: int, tree: Tree) -> None:
    """Write a tree into the folder of a checkpoint, or into that of a rank's part within."""
    if not part.parent.is_dir():
        raise UserError(f"{str(part.parent)!r} is not there; give a run folder that the machines of all ranks see")
    part.mkdir(exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    encoded = _encode(tree, (), tensors)
    try:
        save_file(_storable(tensors), part / TENSOR_FILE)
    except Exception:
        (part / TENSOR_FILE).unlink(missing_ok=True)  # room that others may need while this waits
        raise
    size, digest = _size_and_digest(part / TENSOR_FILE, to_disk=True)
    document = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "transitions": transitions,
        "tensors": {"file": TENSOR_FILE, "bytes": size, "sha256": digest},
        "tree": encoded,
    }
    document["sha256"] = _document_digest(document)
    write_atomically(part / STATE_FILE, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _finish(folder: Path, hidden: Path, target: Path, keep: int) -> None:
    """Give a checkpoint that is complete its name, and delete those that it replaces."""
    if hidden.exists():  # else it was named before the disk was full
        sync_folder(hidden)
        if target.exists():  # a folder that is not empty cannot be renamed over
            aside = folder / (target.name + _REPLACED)
            if aside.exists():
                _delete(aside)
            target.rename(aside)
        hidden.rename(target)
    sync_folder(folder)
    kind, transitions = target.name.partition("-")[0], _transitions(target)
    before = [path for path in _checkpoints(folder, kind) if _transitions(path) < transitions]
    stay = {target, *before[max(0, len(before) - keep + 1) :]}
    for other in list(_checkpoints(folder, kind)):
        if other not in stay:
            _delete(other)


def find_checkpoint(run_dir: Path, kind: str = "last") -> Path:
    """Return the newest checkpoint of a kind in a run folder.

    Raises :class:`CheckpointError` if there is none.
    """
    if not run_dir.is_dir():
        raise CheckpointError(f"no run folder {str(run_dir)!r}: give the folder of an earlier run")
    found = list(_checkpoints(run_dir / CHECKPOINTS, kind))
    if found:
        return found[-1]
    others = [str(path) for path in _checkpoints(run_dir / CHECKPOINTS)]
    cure = (
        f"there is {others[-1]!r}, which evaluate takes as checkpoint={Path(others[-1]).name.partition('-')[0]}"
        if others
        else "the run ended before its first checkpoint; remove the folder and start it anew"
    )
    raise CheckpointError(f"no {kind!r} checkpoint in {str(run_dir / CHECKPOINTS)!r}: {cure}")


def has_later(run_dir: Path, kind: str, transitions: int) -> bool:
    """Return whether a run folder has a checkpoint of a kind from after ``transitions``."""
    return any(_transitions(path) > transitions for path in _checkpoints(run_dir / CHECKPOINTS, kind))


def newest_checkpoint(run_dir: Path, kind: str = "last", ranks: Ranks = ALONE) -> tuple[Path, Tree]:
    """Return the folder and the tree of the newest checkpoint of a kind that is whole; says which were damaged.

    On ``ranks`` other than the first the tree has what they have of their own in place of the first's.

    Raises :class:`CheckpointError`, as :func:`find_checkpoint` and :func:`load_checkpoint` for the newest.
    """
    found: list[Tree] = []

    def find() -> Path:
        path, tree = _newest(run_dir, kind)
        found.append(tree)
        return path

    path = ranks.from_first(find)
    return path, ranks.together(lambda: found[0] if ranks.first else _load(path, ranks.rank))


def _newest(run_dir: Path, kind: str) -> tuple[Path, Tree]:
    newest = find_checkpoint(run_dir, kind)
    damaged: list[CheckpointError] = []
    for path in reversed(list(_checkpoints(run_dir / CHECKPOINTS, kind))):
        try:
            tree = _load(path)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for damage in damaged:
            print(f"warning: {damage}; going on from the one before, {path.name}", file=sys.stderr)
        return path, tree
    return newest, load_checkpoint(newest)


def load_checkpoint(path: Path) -> Tree:
    """Read a checkpoint folder back, checking every byte; tensors are on the CPU.

    Raises :class:`CheckpointError` that names the file if one is missing, cut, changed or of an unknown
    format, and names another complete checkpoint of the run if there is one.
    """
    try:
        return _load(path)
    except CheckpointError as error:
        others = sorted(_checkpoints(path.parent), key=_transitions, reverse=True)
        complete = next((other for other in others if other != path and _is_complete(other)), None)
        cure = "no other complete one is there"
        if complete is not None and complete.name.partition("-")[0] == path.name.partition("-")[0]:
            cure = f"{str(complete)!r} is complete: remove the damaged folder to use it"
        elif complete is not None:
            cure = (
                f"{str(complete)!r} is complete: evaluate takes it as checkpoint={complete.name.partition('-')[0]}"
            )
        raise CheckpointError(f"{error}; {cure}") from error


@contextmanager
def fitting(run_dir: Path) -> Iterator[None]:
    """Raise :class:`CheckpointError` where a state, inside, does not fit what ``config.yaml`` makes."""
    try:
        yield
    except UserError:
        raise
    except STUMBLES as error:
        raise CheckpointError(
            f"the checkpoint of {str(run_dir)!r} does not fit its config.yaml ({one_line(error)}); put back "
            "what was changed there: env, network, critic or algorithm"
        ) from error


def _load(path: Path, rank: int = 0) -> Tree:
    """Read a checkpoint; the first rank checks all files, others read those of the first and their own."""
    tree = _tree(path, _verified_document(path))
    for other in range(1, _ranks(tree)) if rank == 0 else [rank]:
        part = _part(path, other)
        document = _verified_document(part)
        if document.get("transitions") != tree.get("transitions"):
            raise CheckpointError(f"damaged checkpoint {str(part)!r}: it is of another moment")
        if rank:
            own = _tree(part, document)
            tree = tree | {key: tree[key] | own[key] for key in own}
    return tree


def _tree(path: Path, document: dict[str, Any]) -> Tree:
    try:
        tree = _decode(document["tree"], load_file(path / TENSOR_FILE))
    except STUMBLES as error:
        raise CheckpointError(f"damaged checkpoint {str(path)!r}: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"damaged checkpoint {str(path)!r}: its tree is not a mapping")
    return tree


def _ranks(tree: Tree) -> int:
    ranks = tree.get("ranks", 1)
    return ranks if isinstance(ranks, int) and 0 < ranks <= _MOST_RANKS else 1


def _part(path: Path, rank: int) -> Path:
    """Return the folder of what a rank has of its own in a checkpoint."""
    return path / f"rank-{rank}" if rank else path


def _is_complete(path: Path) -> bool:
    try:
        _load(path)
    except CheckpointError:
        return False
    return True


def _verified_document(path: Path) -> dict[str, Any]:
    """Return ``state.json`` after checking it and the tensor file against their recorded digests."""
    state_file, tensor_file = path / STATE_FILE, path / TENSOR_FILE
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {str(path)!r}")
    for file in (state_file, tensor_file):
        if not file.is_file():
            raise CheckpointError(f"incomplete checkpoint: {str(file)!r} is missing")
    try:
        document = read_object(state_file)
        version, stated = document.get("format_version"), document.pop("sha256", None)
        unchanged = stated == _document_digest(document)
    except UserError as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from error
    except STUMBLES as error:
        raise CheckpointError(f"damaged checkpoint file {str(state_file)!r}: {one_line(error)}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {str(path)!r} has format version {version!r}: this version of varshare_rl reads "
            f"version {FORMAT_VERSION}"
        )
    if not unchanged:
        raise CheckpointError(f"damaged checkpoint file {str(state_file)!r}: its content was changed")
    try:
        expected, digest = document["tensors"]["bytes"], document["tensors"]["sha256"]
    except STUMBLES as error:
        raise CheckpointError(f"damaged checkpoint file {str(state_file)!r}: {one_line(error)}") from error
    size = tensor_file.stat().st_size
    if size != expected:
        raise CheckpointError(f"damaged checkpoint file {str(tensor_file)!r}: {size} bytes instead of {expected}")
    if _size_and_digest(tensor_file)[1] != digest:
        raise CheckpointError(f"damaged checkpoint file {str(tensor_file)!r}: its content was changed")
    return document


def _checkpoints(folder: Path, kind: str | None = None) -> Iterator[Path]:
    """Yield the checkpoints in a folder, of one kind or of all, oldest first."""
    if not folder.is_dir():
        return
    matches = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    matches.sort(key=lambda pair: (int(pair[0]["transitions"]), pair[0]["replaced"] is None))
    for match, path in matches:
        if kind is None or match["kind"] == kind:
            yield path


def _transitions(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match["transitions"]) if match else -1


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint so that no moment shows half of one under its name."""
    hidden = checkpoint.with_name(_HIDDEN + checkpoint.name)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def _size_and_digest(file: Path, to_disk: bool = False) -> tuple[int, str]:
    # SHA-256 runs at about 2 GB/s on current CPUs, near the speed of the write itself.
    with file.open("rb") as handle:
        if to_disk:
            os.fsync(handle.fileno())
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return handle.tell(), digest


def _document_digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


# The tree as JSON. What JSON has no word for is an object with a single key that starts with "$".


def _encode(node: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, dict):
        if all(isinstance(key, str) for key in node) and not any(key.startswith("$") for key in node):
            return {key: _encode(item, (*path, key), tensors) for key, item in node.items()}
        pairs = [[_encode_key(key, path), _encode(item, (*path, str(key)), tensors)] for key, item in node.items()]
        return {"$items": pairs}
    if isinstance(node, list | tuple):
        items = [_encode(item, (*path, str(index)), tensors) for index, item in enumerate(node)]
        return items if isinstance(node, list) else {"$tuple": items}
    if isinstance(node, torch.Tensor):
        return {"$tensor": _keep(node.detach(), path, tensors)}
    if isinstance(node, np.ndarray):
        return {"$ndarray": _keep(_from_numpy(node, path), path, tensors)}
    if isinstance(node, np.bool_ | np.integer | np.float16 | np.float32 | np.float64):
        return {"$scalar": [node.dtype.name, _encode(node.item(), path, tensors)]}
    if isinstance(node, float):
        # repr() of a finite float is exact; JSON has no NaN and no infinity
        return node if math.isfinite(node) else {"$float": repr(node)}
    if node is None or isinstance(node, bool | int | str):
        return node
    raise TypeError(f"a checkpoint cannot hold a {type(node).__name__} (at {'.'.join(path)!r})")


def _encode_key(key: Any, path: tuple[str, ...]) -> str | int:
    if isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool)):
        return key
    raise TypeError(f"a checkpoint cannot hold the key {key!r} (at {'.'.join(path)!r}): use str or int keys")


def _keep(tensor: torch.Tensor, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> str:
    stem = name = ".".join(path)
    number = 1
    while name in tensors or name == "__metadata__":  # {"a.b": x, "a": {"b": y}} makes one name twice
        number += 1
        name = f"{stem}#{number}"
    tensors[name] = tensor
    return name


def _from_numpy(array: np.ndarray[Any, Any], path: tuple[str, ...]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise TypeError(f"a checkpoint cannot hold an array of {array.dtype} (at {'.'.join(path)!r})") from error


def _storable(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors contiguous, on the CPU and each in memory of its own, as safetensors asks."""
    taken: dict[int, list[tuple[int, int]]] = {}  # by storage: bytes that are in a tensor already
    result = {}
    for name, tensor in tensors.items():
        stored = tensor.cpu().contiguous()
        begin = stored.data_ptr()
        end = begin + stored.nbytes
        others = taken.setdefault(stored.untyped_storage().data_ptr(), [])
        shared = any(first < end and begin < last for first, last in others)
        result[name] = stored.clone() if shared else stored
        others.append((begin, end))
    return result


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        ((word, value),) = node.items()
        if word == "$items":
            return {key: _decode(item, tensors) for key, item in value}
        if word == "$tuple":
            return tuple(_decode(item, tensors) for item in value)
        if word == "$tensor":
            return tensors[value]
        if word == "$ndarray":
            return tensors[value].numpy()
        if word == "$scalar":
            return np.dtype(value[0]).type(_decode(value[1], tensors))
        if word == "$float":
            return float(value)
    return {key: _decode(item, tensors) for key, item in node.items()}
