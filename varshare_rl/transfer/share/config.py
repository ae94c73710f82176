"""Options of Share, and what of them cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from varshare_rl.errors import UserError

#: The bound on a task's relative error in any layer that holds unless something else is asked for.
DEFAULT_MAX_ERROR = 0.05
#: The explained variance of the published method, its only rule.
PAPER_EXPLAINED = 0.6


class BasisMethod(Enum):
    """How adapters become a basis."""

    share = "share"  # SVD of canonical factors, uncentred; coefficients from the core
    paper = "paper"  # as published: SVD of the factors as they are, centred; coefficients are projections
    delta = "delta"  # SVD over tasks of the flattened corrections


class Merge(Enum):
    """When new adapters make a basis decompose again; otherwise they are projected and it stays as it is."""

    needed = "needed"  # if one is projected with more error than k.max_error; always under the other rules for k
    always = "always"  # as published
    never = "never"


@dataclass
class SizeConfig:
    """The number of directions ``k`` of every layer, by one of three rules.

    ``max_error``: the least ``k`` with which no task's relative error in the layer exceeds it; ``explained``: the
    least ``k`` that explains this share of the variance; ``fixed``: this many. None given: the method's own rule,
    ``max_error=0.05``, or ``explained=0.6`` for ``paper``.
    """

    max_error: float | None = None
    explained: float | None = None
    fixed: int | None = None


@dataclass
class ShareConfig:
    """How adapters are merged into a basis.

    Attributes:
        method: see :class:`BasisMethod`.
        k: number of directions, see :class:`SizeConfig`.
        p: columns of the coefficients, the rank of what is rebuilt; None: the adapter's own.
        keep_originals: keep the adapters, so that every merge starts from them and nothing drifts; they are
            counted as stored.
    """

    method: BasisMethod = BasisMethod.share
    k: SizeConfig = field(default_factory=SizeConfig)
    p: int | None = None
    keep_originals: bool = False

    def size(self) -> SizeConfig:
        """The rule for ``k`` with the method's own in place of none."""
        if (self.k.max_error, self.k.explained, self.k.fixed) != (None, None, None):
            return self.k
        if self.method is BasisMethod.paper:
            return SizeConfig(explained=PAPER_EXPLAINED)
        return SizeConfig(max_error=DEFAULT_MAX_ERROR)


def check_options(config: ShareConfig) -> None:
    """Refuse what cannot be.

    Raises:
        UserError: names the option, its value, and what is allowed.
    """
    k = config.k
    given = [name for name in ("max_error", "explained", "fixed") if getattr(k, name) is not None]
    if len(given) > 1:
        raise UserError(f"k.{given[0]} and k.{given[1]} are both given; choose one rule for k")
    if k.max_error is not None and not 0 <= k.max_error < 1:
        raise UserError(f"k.max_error is {k.max_error}; it must be at least 0 and below 1")
    if k.explained is not None and not 0 < k.explained <= 1:
        raise UserError(f"k.explained is {k.explained}; it must be above 0 and at most 1")
    if k.fixed is not None and k.fixed < 1:
        raise UserError(f"k.fixed is {k.fixed}; it must be at least 1")
    if config.p is not None and config.p < 1:
        raise UserError(f"p is {config.p}; it must be at least 1, or null for each adapter's own rank")
    if config.p is not None and config.method is BasisMethod.delta:
        raise UserError(f"p is {config.p}, but method=delta has no columns of coefficients; leave p out")
