"""Options as a command line has them: values in Hydra's words, in quotes where a shell needs them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

#: Words that mean something else where they are not in quotes.
NOT_WORDS = {"true", "false", "null", "nan", "inf", "yes", "no", "on", "off"}
#: Names of repeated tasks, `Pendulum-v1#2` and `normal_left (2)`, which Hydra would not read without quotes.
_NUMBERED = re.compile(r"([\w./:-]+?)(#\d+| \(\d+\))(\s*:)?(?!\w)")


def override(name: str, value: Any) -> str:
    """Return ``name=value`` so that a shell and Hydra, one after the other, read the value as it is."""
    return shlex.quote(f"{name}={literal(value)}")


def literal(value: Any) -> str:
    """Return a value as the command line has it: Hydra's words for Python's."""
    if value is None:
        return "null"
    if isinstance(value, Enum):
        return literal(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{literal(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(literal(entry) for entry in value) + "]"
    text = str(value)
    if re.fullmatch(r"(\.{1,2}/)*[A-Za-z_/][\w./-]*", text, re.ASCII) and text.lower() not in NOT_WORDS:
        return text
    # In quotes a quote has a backslash, and so have backslashes before one; ${ would begin an interpolation.
    return "'" + re.sub(r"(\\*)('|\$\{|$)", lambda m: m[1] * 2 + (f"\\{m[2]}" if m[2] else ""), text) + "'"


def quote_names(value: str) -> str:
    """Put quotes around names of repeated tasks in a value without any quotes.

    Keys of a dict cannot have quotes; there ``#`` becomes ``@``.
    """

    def quoted(match: re.Match[str]) -> str:
        name, number, colon = match.groups()
        return f"{name}{number.replace('#', '@')}{colon}" if colon else f"'{name}{number}'"

    return value if "'" in value or '"' in value else _NUMBERED.sub(quoted, value)
