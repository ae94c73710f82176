"""Files that somebody may have got from elsewhere: read without running, following or unfolding anything.

What is wrong with them is one line, whatever a reader stumbles over.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from re import _parser as regex  # type: ignore[attr-defined]  # the parser of re itself
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from varshare_rl.errors import UserError, one_line

#: Most bytes of a file of JSON or YAML: a thousand times those of the largest that runs write.
MOST_BYTES = 1 << 30
MOST_YAML_BYTES = 1 << 21
#: Most levels of YAML. Nothing that is written here has ten.
MOST_LEVELS = 50
#: Most repetitions without a bound in a regular expression, whose matching takes a power of so many.
MOST_REPETITIONS = 4

_EVENTS: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

#: What code that interprets a file raises at one that is not as it should be.
STUMBLES = (
    ArithmeticError, AttributeError, LookupError, MemoryError, NameError, OSError, RuntimeError, TypeError,
    ValueError, OmegaConfBaseException, SafetensorError, yaml.YAMLError,
)  # fmt: skip


@contextmanager
def reading(what: object, advice: str = "") -> Iterator[None]:
    """Raise UserError, one line, for whatever goes wrong inside while the content of ``what`` is interpreted."""
    try:
        yield
    except UserError:
        raise
    except STUMBLES as error:
        raise UserError(f"cannot read {what}: {one_line(error)}{advice and f'; {advice}'}") from error


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a plain file.

    Raises:
        UserError: it is missing, no plain file (a pipe would be waited for), or larger than ``most`` bytes.
    """
    with reading(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"cannot read {path}: it is no plain file")
        if status.st_size > most:
            raise UserError(f"cannot read {path}: it has {status.st_size:,} bytes, and at most {most:,} are read")
        return path.read_bytes()


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError as :func:`read_bytes`, and where it is damaged."""
    content = read_bytes(path)
    with reading(path, "it is damaged"):
        return json.loads(content)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises UserError as :func:`read_json`."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise UserError(f"cannot read {path}: it holds no JSON object; it is damaged")
    return document


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values as OmegaConf has them.

    Raises:
        UserError: as :func:`read_bytes`; it is damaged; or it has aliases, which unfold without a bound, levels
            without end, or interpolations (``${...}``), which could look up the environment's secrets.
    """
    content = read_bytes(path, MOST_YAML_BYTES)
    with reading(path, "it is damaged"):
        text, level = content.decode("utf-8"), 0
        for event in yaml.parse(text, Loader=_EVENTS):
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"cannot read {path}: it has aliases (*name), which no stored file has")
            if level > MOST_LEVELS:
                raise UserError(f"cannot read {path}: it has more than {MOST_LEVELS} levels")
            if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
                raise UserError(
                    f"cannot read {path}: {event.value[:60]!r} is to be looked up; write the value itself"
                )
        return OmegaConf.create(text) if text.strip() else OmegaConf.create()


def check_folder(folder: Path) -> None:
    """Refuse a folder with pipes, devices or links that lead out of it, through which all would be done.

    Raises:
        UserError: names the first.
    """
    root = folder.resolve()
    with reading(folder):
        for parent, folders, files in os.walk(root):
            for name in (*folders, *files):
                path = Path(parent, name)
                mode = path.lstat().st_mode
                if stat.S_ISLNK(mode):
                    if not path.resolve().is_relative_to(root):
                        raise UserError(f"{path} is a link out of {folder}; put there what it leads to")
                elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise UserError(f"{path} is neither a file nor a folder; remove it")


def check_pattern(pattern: str) -> None:
    """Refuse a regular expression whose matching could take for ever.

    Raises:
        ValueError: it is none, repeats what repeats or branches, or repeats without a bound too often.
    """
    try:
        tree = regex.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:60]!r} is no regular expression: {error}") from error
    if _repetitions(tree, inside=False) > MOST_REPETITIONS:
        raise ValueError(f"{pattern[:60]!r} could take for ever: it repeats more than {MOST_REPETITIONS} times")


def _repetitions(tree: Any, inside: bool) -> int:
    """Count the repetitions without a bound in a parsed expression."""
    count = 0
    for kind, value in tree:
        name = str(kind)
        repeats = name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") and value[1] > 1
        if inside and (repeats or name in ("BRANCH", "GROUPREF")):
            raise ValueError("it could take for ever: it repeats what repeats or branches itself")
        count += repeats
        parts = value if isinstance(value, list | tuple) else ()
        for part in _parsed(parts):
            count += _repetitions(part, inside or repeats)
    return count


def _parsed(parts: Any) -> Iterator[Any]:
    """Yield the parsed expressions in the argument of one."""
    for part in parts:
        if isinstance(part, regex.SubPattern):
            yield part
        elif isinstance(part, list | tuple):
            yield from _parsed(part)
