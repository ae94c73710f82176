"""Options of Share, and what of them cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from varshare_rl.errors import UserError
from varshare_rl.fields import bounded

#: The bound on a task's relative error in any layer that holds unless something else is asked for.
DEFAULT_MAX_ERROR = 0.05
#: The explained variance of the published method, its only rule.
PAPER_EXPLAINED = 0.6


class BasisMethod(Enum):
    """Settings by which adapters become a basis."""

    share = "share"  # SVD of canonical factors, uncentred; coefficients from the core
    paper = "paper"  # as published: SVD of the factors as they are, centred; coefficients are projections
    delta = "delta"  # SVD over tasks of the flattened corrections, centred on request


class Merge(Enum):
    """Conditions on which new adapters make a basis decompose again; else they are projected onto it."""

    needed = "needed"  # if one is projected with more error than k.max_error; always under the other rules for k
    always = "always"  # as published
    never = "never"


#: Columns of the coefficients of a new task unless it is said otherwise: a third of the largest rank, rounded up.
THIRD = "third"


def check_columns(p: Any, prefix: str) -> None:
    """Raise UserError unless ``p`` is a positive number, ``third`` or None."""
    if p is not None and p != THIRD and (isinstance(p, bool) or not isinstance(p, int) or p < 1):
        raise UserError(
            f"{prefix}p is {p}; give a number of at least 1, {THIRD} of the rank, or null for all of it"
        )


def new_columns(p: int | str | None, ranks: Sequence[int], whole: bool = False) -> int:
    """Return the columns of a new task's coefficients beside tasks of some ranks; ``whole``: no third of them."""
    if isinstance(p, int):
        return p
    return -(-max(ranks) // 3) if p == THIRD and not whole else max(ranks)


@dataclass
class SizeConfig:
    """The number of directions ``k`` of every layer, by one of three rules.

    None given: the method's own rule, ``max_error=0.05``, or ``explained=0.6`` for ``paper``.
    """

    max_error: float | None = bounded(None, least=0, below=1)
    "The least `k` with which no task's relative error in the layer exceeds this, 2e-6 for rounding at least."
    explained: float | None = bounded(None, above=0, most=1)
    "The least `k` that explains this share of the variance."
    fixed: int | None = bounded(None, least=1)
    "This many directions."

    def check(self, prefix: str) -> None:
        """Raise UserError for more than one rule."""
        given = [rule.name for rule in fields(self) if getattr(self, rule.name) is not None]
        if len(given) > 1:
            raise UserError(f"{prefix}{given[0]} and {prefix}{given[1]} are both given; choose one rule for k")


@dataclass
class ShareConfig:
    """Merging of adapters into a basis."""

    method: BasisMethod = BasisMethod.share
    "Decomposition of the adapters: `share`, as published (`paper`), or of the flattened corrections (`delta`)."
    k: SizeConfig = field(default_factory=SizeConfig)
    "Number of directions of every layer, by one rule."
    p: int | None = bounded(None, least=1)
    "Columns of the coefficients, the rank of what is rebuilt; null: each adapter's own, so that nothing is cut."
    centred: bool = False
    "With `delta`: decompose the corrections minus their mean, which is kept beside the basis."
    keep_originals: bool = False
    "Keep the adapters, so that every merge starts from them and nothing drifts; they count as stored."

    def size(self) -> SizeConfig:
        """The rule for ``k`` with the method's own in place of none."""
        if (self.k.max_error, self.k.explained, self.k.fixed) != (None, None, None):
            return self.k
        if self.method is BasisMethod.paper:
            return SizeConfig(explained=PAPER_EXPLAINED)
        return SizeConfig(max_error=DEFAULT_MAX_ERROR)

    def check(self, prefix: str) -> None:
        """Raise UserError for columns of coefficients where there are none, and for a mean where none is chosen."""
        if self.p is not None and self.method is BasisMethod.delta:
            raise UserError(
                f"{prefix}p is {self.p}, but method=delta has no columns of coefficients; leave {prefix}p out"
            )
        if self.centred and self.method is not BasisMethod.delta:
            raise UserError(
                f"{prefix}centred=true is for method=delta, and method is {self.method.value}: share is never "
                "centred, paper always"
            )
