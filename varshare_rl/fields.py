"""Fields of config classes with bounds, and the check of them. Knows no more of the package than its error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
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
    """Refuse numbers outside the bounds of their fields, and infinity and NaN anywhere.

    Dataclasses inside are checked too. A method ``check(prefix)`` of one refuses relations among its own options.
    ``prefix`` comes before the names, such as ``elbo.``.

    Raises:
        UserError: names the first such option, its value, and what is allowed.
    """
    for option in fields(config):
        _check_value(f"{prefix}{option.name}", getattr(config, option.name), option.metadata.get("bounds"))
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
