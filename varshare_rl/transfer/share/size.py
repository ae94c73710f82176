"""How many directions a layer gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from varshare_rl.errors import UserError
from varshare_rl.transfer.share.config import SizeConfig

#: What float32 rounding may add to an error that is not allowed to grow.
ROUNDING = 1e-6

#: Errors ``[t]`` that all tasks would have with ``k`` directions.
ErrorsAt = Callable[[int], Tensor]


def choose_k(
    rule: SizeConfig, spectra: Sequence[Tensor], errors_at: ErrorsAt, before: Tensor, names: Sequence[str]
) -> int:
    """The number of directions by the rule.

    Args:
        rule: see :class:`SizeConfig`; one of its three is given.
        spectra: singular values of each side, decreasing.
        errors_at: relative errors ``[t]`` for a number of directions; they do not grow with it.
        before: errors ``[t]`` that the tasks had before this merge, which no basis can mend; 0 for new ones.
        names: the tasks.

    Raises:
        UserError: no number of directions keeps to ``max_error``; the message names the task.
    """
    most = max(len(spectrum) for spectrum in spectra)
    if rule.fixed is not None:
        return min(rule.fixed, most)
    if rule.explained is not None:
        return max(explaining(spectrum, rule.explained) for spectrum in spectra)
    assert rule.max_error is not None
    allowed = torch.clamp_min(before, rule.max_error) + ROUNDING
    excess = errors_at(most) - allowed
    if bool((excess > 0).any()):
        worst = int(excess.argmax())
        raise UserError(
            f"k.max_error={rule.max_error} cannot be met: with all {most} directions task {names[worst]!r} has an "
            f"error of {float(errors_at(most)[worst]):.3g}; give a larger p or k.max_error, or method=share"
        )
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if bool((errors_at(middle) <= allowed).all()):
            high = middle
        else:
            low = middle
    return high


def explaining(spectrum: Tensor, fraction: float) -> int:
    """The least ``k`` with ``sum_{j<=k} s_j^2 >= fraction * sum_j s_j^2``."""
    explained = spectrum.square().cumsum(0)
    return int((explained < fraction * explained[-1] * (1 - 1e-12)).sum()) + 1
