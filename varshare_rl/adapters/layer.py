"""A frozen linear layer with named low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varshare_rl.adapters.adapter import LowRank
from varshare_rl.nn.task_rows import TaskRows, task_rows
from varshare_rl.ops.linear import linear, low_rank_linear


@dataclass
class Selection:
    """Adapters that the layers of one model apply; all of them look at the same object.

    Attributes:
        names: the adapters in use, none for the base alone.
        ids: for each row of the batch an index into ``names``, ``[N]``; None when one adapter serves all rows.
        merged: the adapter that is folded into the base weights.
    """

    names: tuple[str, ...] = ()
    ids: Tensor | None = None
    merged: str | None = None


@dataclass(frozen=True)
class Setting:
    """Setting of an adapter besides its factors: the factor on ``b a``, and the dropout of its input."""

    scale: float
    dropout: float


class LoRALinear(nn.Module):
    """``y = x W^T + bias + scale_k (dropout_k(x) A_k^T) B_k^T`` for the adapter ``k`` of each row.

    Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*. ``W`` and ``bias`` are those of ``base``
    and frozen. In the terms of this package it is VarShare-LoRA without noise and with a theta that does not
    learn. Factors are parameters ``a:<name> [r, F]`` and ``b:<name> [G, r]``, of a rank of their own for each
    name. A name without factors here leaves the base as it is.
    """

    def __init__(self, base: nn.Linear, selection: Selection) -> None:
        super().__init__()
        self.base = base
        self.selection = selection
        self.settings: dict[str, Setting] = {}
        self.stored: Tensor | None = None  # the base weight while an adapter is folded into it

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters ``a`` and ``b`` of an adapter."""
        return self.get_parameter(f"a:{name}"), self.get_parameter(f"b:{name}")

    def set_factors(self, name: str, factors: LowRank, dropout: float) -> None:
        """Take copies of factors as parameters that are trained."""
        weight = self.base.weight
        for key, factor in (("a", factors.a), ("b", factors.b)):
            copy = factor.detach().to(device=weight.device, dtype=weight.dtype, copy=True)
            self.register_parameter(f"{key}:{name}", nn.Parameter(copy))
        self.settings[name] = Setting(factors.scale, dropout)

    def remove_factors(self, name: str) -> None:
        """Forget an adapter, if there is one of this name."""
        if self.settings.pop(name, None) is not None:
            delattr(self, f"a:{name}")
            delattr(self, f"b:{name}")

    def low_rank(self, name: str) -> LowRank | None:
        """Copies of an adapter's factors, None if this layer has none of that name."""
        if name not in self.settings:
            return None
        a, b = (factor.detach().clone() for factor in self.factors(name))
        return LowRank(a, b, self.settings[name].scale)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., F]`` to ``[..., G]``; when rows have adapters of their own, rows are the first dimension.

        Raises:
            ValueError: the first dimension of ``x`` is not the number of rows that adapters were named for.
        """
        names = [] if self.selection.merged else self.selection.names
        if not any(name in self.settings for name in names):
            return linear(x, self.base.weight, self.base.bias)
        rows = _rows(x, self.selection.ids, len(names))
        y = self._adapted(rows, names)
        return rows.restore(y).reshape(*x.shape[:-1], y.shape[-1])

    def _adapted(self, rows: TaskRows, names: Sequence[str]) -> Tensor:
        a, b = (rows.select(stack) for stack in self._stacked(names))
        weight, bias = self.base.weight, self.base.bias
        dropouts = [self.settings[name].dropout if name in self.settings else 0.0 for name in names]
        inner = None
        if self.training and any(dropouts):
            dropout = rows.select(torch.tensor(dropouts, device=a.device, dtype=a.dtype)).view(-1, 1, 1)
            kept = torch.rand_like(rows.x) >= dropout
            inner = rows.x * kept / (1.0 - dropout)
        return low_rank_linear(rows.x, weight, bias, a, b, 1.0, inner=inner)

    def _stacked(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Factors ``[K, r, F]`` and ``[K, G, r]`` of the largest rank, filled with zeros; ``b`` has the scale."""
        pairs = {name: self.factors(name) for name in names if name in self.settings}
        rank = max(a.shape[0] for a, _ in pairs.values())
        weight = self.base.weight
        stack_a, stack_b = [], []
        for name in names:
            if name not in pairs:
                stack_a.append(weight.new_zeros(rank, weight.shape[1]))
                stack_b.append(weight.new_zeros(weight.shape[0], rank))
                continue
            a, b = pairs[name]
            stack_a.append(F.pad(a, (0, 0, 0, rank - a.shape[0])))
            stack_b.append(F.pad(b * self.settings[name].scale, (0, rank - a.shape[0])))
        return torch.stack(stack_a), torch.stack(stack_b)

    @torch.no_grad()
    def merge(self, name: str) -> None:
        """Fold an adapter into the base weight and keep the weight as it was."""
        factors = self.low_rank(name)
        if factors is not None:
            weight = self.base.weight
            self.stored = weight.detach().clone()
            delta = factors.delta()
            weight.copy_(weight.to(delta.dtype) + delta)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weight that :meth:`merge` kept, bit for bit."""
        if self.stored is not None:
            self.base.weight.copy_(self.stored)
            self.stored = None

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: rank {self.factors(name)[0].shape[0]}, scale {setting.scale:g}"
            for name, setting in self.settings.items()
        )


def _rows(x: Tensor, ids: Tensor | None, adapters: int) -> TaskRows:
    """Rows brought together by adapter, ``[K, B, F]``."""
    if ids is None:
        return task_rows(x, 0, 1)
    if x.dim() < 2 or x.shape[0] != len(ids):
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit {len(ids)} rows; rows are the first dimension, each with "
            "the adapter named for it"
        )
    if x.dim() == 2:
        return task_rows(x, ids, adapters)
    if adapters == len(ids):  # every block has an adapter of its own, as in [T, B, F]: nothing to sort
        return task_rows(x.flatten(1, -2), ids, adapters)
    return task_rows(x.flatten(0, -2), ids.repeat_interleave(x.shape[1:-1].numel()), adapters)
