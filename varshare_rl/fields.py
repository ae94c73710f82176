"""Fields of config classes: bounds, their check, what they mean. Knows no more of the package than its error."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, cast

from varshare_rl.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """Numbers that an option may have; ``above`` and ``below`` are not among them."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def allow(self, value: float) -> bool:
        """Return True when a number is within; NaN never is."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"between {self.least} and {self.most}"
        if self == Bounds(above=0):
            return "positive"
        sides = [("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below)]
        return " and ".join(f"{words} {bound}" for words, bound in sides if bound is not None)


def bounded(
    default: T,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> T:
    """A field of a dataclass whose number, or every number of whose list, is within bounds; None always is."""
    metadata = {"bounds": Bounds(least, most, above, below)}
    if isinstance(default, list):
        return cast(T, field(default_factory=lambda: list(default), metadata=metadata))
    return field(default=default, metadata=metadata)


def check_bounds(config: Any, prefix: str = "") -> None:
    """Refuse numbers outside the bounds of their fields, infinity and NaN anywhere, and no list where one must be.

    Dataclasses inside are checked too. A method ``check(prefix)`` of one refuses relations among its own options.
    ``prefix`` comes before the names, such as ``elbo.``.

    Raises:
        UserError: names the first such option, its value, and what is allowed.
    """
    for option in fields(config):
        value = getattr(config, option.name)
        if str(option.type).startswith("list[") and not isinstance(value, list | tuple | None):  # by ${...}
            raise UserError(f"{prefix}{option.name} is {value}; it must be a list, such as [{value}]")
        _check_value(f"{prefix}{option.name}", value, option.metadata.get("bounds"))
    if hasattr(config, "check"):
        config.check(prefix)


def _check_value(name: str, value: Any, bounds: Bounds | None) -> None:
    if is_dataclass(value):
        check_bounds(value, f"{name}.")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _check_value(f"{name}[{index}]", entry, bounds)
    elif isinstance(value, int | float) and not isinstance(value, bool | Enum):
        if bounds is not None and not bounds.allow(value):
            raise UserError(f"{name} is {value}; it must be {bounds}")
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}; it must be a finite number")


def check_below(config: Any, prefix: str, low: str, high: str) -> None:
    """Raise UserError unless the option ``low`` is below the option ``high``."""
    first, second = getattr(config, low), getattr(config, high)
    if not first < second:
        raise UserError(f"{prefix}{low} is {first}; it must be below {high}, {second}")


@cache
def sentences(config: type) -> dict[str, str]:
    """Return the sentence under every field of a config class, base classes' included."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if not is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError):  # a class that was made, not written
            continue
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                assert isinstance(statement.target, ast.Name)
                if isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
                    found[statement.target.id] = " ".join(following.value.value.split())
    return found


def option_sentence(config: Any, name: str) -> str:
    """Return the sentence of an option of a config by its dotted name; nothing where there is none.

    A component's ``name`` is what chooses it: its sentence is that of the component.
    """
    path = name.removesuffix(".name").split(".")
    for part in path[:-1]:
        config = getattr(config, part, None)
    if not is_dataclass(config):
        return ""
    made = {entry.name: str(entry.metadata.get("sentence", "")) for entry in fields(config)}
    kind: type = type(config)
    return sentences(kind).get(path[-1], made.get(path[-1], ""))
