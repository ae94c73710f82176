"""A frozen linear layer with named low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varshare_rl.adapters.adapter import LowRank
from varshare_rl.adapters.targets import is_conv1d, linear_weight
from varshare_rl.errors import UserError
from varshare_rl.nn.applied_weight import AppliedWeight
from varshare_rl.nn.task_rows import TaskRows, task_rows
from varshare_rl.ops.linear import add_low_rank
from varshare_rl.ops.low_rank import wide_dtype


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
    """``y = base(x) + scale_k (dropout_k(x) A_k^T) B_k^T`` for the adapter ``k`` of each row.

    Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*. ``base`` is frozen and called, so what
    hangs on it (hooks, weight norm, pruning) acts as before. In the terms of this package it is VarShare-LoRA
    without noise and with a theta that does not learn. Factors are parameters ``a:<name> [r, F]`` and
    ``b:<name> [G, r]`` in float32 at least, of a rank of their own for each name. An adapter that started from the
    base weight has its start ``a0:<name>``, ``b0:<name>`` beside them, which is subtracted. A name without factors
    here leaves the base as it is.

    Args:
        base: an ``nn.Linear``, or the Conv1D of `transformers`.
        selection: the adapters in use.
    """

    def __init__(self, base: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.base = base
        self.selection = selection
        self.settings: dict[str, Setting] = {}
        self.stored: Tensor | None = None  # the base weight while an adapter is folded into it

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return linear_weight(self.base).shape[1]

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return linear_weight(self.base).shape[0]

    @property
    def weight(self) -> Tensor:
        """The weight that is applied, in the base's layout; built only if its values are used."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return AppliedWeight.of(weight, self._applied_weight) if self._applied() else weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters ``a`` and ``b`` of an adapter."""
        return getattr(self, f"a:{name}"), getattr(self, f"b:{name}")

    def set_factors(self, name: str, factors: LowRank, dropout: float, start: LowRank | None = None) -> None:
        """Take copies of factors as parameters that are trained, and what they start from as constants."""
        weight = linear_weight(self.base)
        for key, factor in (("a", factors.a), ("b", factors.b)):
            kind = wide_dtype(weight.dtype, factor.dtype)
            copy = factor.detach().to(device=weight.device, dtype=kind, copy=True)
            self.register_parameter(f"{key}:{name}", nn.Parameter(copy))
        if start is not None:
            for key, factor in (("a0", start.a), ("b0", start.b)):
                self.register_buffer(f"{key}:{name}", factor.to(copy))
        self.settings[name] = Setting(factors.scale, dropout)

    def remove_factors(self, name: str) -> None:
        """Forget an adapter, if there is one of this name."""
        if self.settings.pop(name, None) is not None:
            for key in ("a", "b", "a0", "b0"):
                if hasattr(self, f"{key}:{name}"):
                    delattr(self, f"{key}:{name}")

    def low_rank(self, name: str) -> LowRank | None:
        """Copies of an adapter's factors, None if this layer has none of that name."""
        if name not in self.settings:
            return None
        a, b = (factor.detach().clone() for factor in self._whole(name))
        return LowRank(a, b, self.settings[name].scale)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., F]`` to ``[..., G]`` in the base's type; rows with adapters of their own are the first dimension.

        Raises:
            ValueError: the first dimension of ``x`` is not the number of rows that adapters were named for.
        """
        if not self._applied():
            return self.base(x, *args, **kwargs)  # type: ignore[no-any-return]
        names, ids = self.selection.names, self.selection.ids
        rows = None if ids is None else _rows(x, ids, len(names))
        y: Tensor = self.base(x, *args, **kwargs)
        a, b = self._stacked(names)
        if rows is None:
            inner = self._dropped(x.reshape(1, -1, x.shape[-1]).to(a.dtype), names)
            return add_low_rank(y.reshape(1, -1, y.shape[-1]), inner, a, b, 1.0).reshape(y.shape)
        used = names if rows.ids is None else [names[place] for place in rows.ids.tolist()]
        inner = self._dropped(rows.x.to(a.dtype), used)
        low_rank = torch.bmm(torch.bmm(inner, rows.select(a).mT), rows.select(b).mT)
        return (y + rows.restore(low_rank).reshape(y.shape)).to(y.dtype)

    def _applied(self) -> bool:
        """Return True if an adapter in use has factors here."""
        return self.selection.merged is None and any(name in self.settings for name in self.selection.names)

    def _dropped(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Inputs ``[K, B, F]`` after the dropout of the adapter of each block."""
        chances = [self.settings[name].dropout if name in self.settings else 0.0 for name in names]
        if not self.training or not any(chances):
            return x
        kept = 1.0 - x.new_tensor(chances).view(-1, 1, 1)
        return x * (torch.rand_like(x) < kept) / kept

    def _whole(self, name: str) -> tuple[Tensor, Tensor]:
        """Factors of an adapter as it acts: what it started from is subtracted."""
        a, b = self.factors(name)
        if f"a0:{name}" not in self._buffers:
            return a, b
        return torch.cat([a, getattr(self, f"a0:{name}")]), torch.cat([b, -getattr(self, f"b0:{name}")], dim=1)

    def _stacked(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Factors ``[K, r, F]`` and ``[K, G, r]`` of the largest rank, filled with zeros; ``b`` has the scale."""
        pairs = {name: self._whole(name) for name in names if name in self.settings}
        if len(names) == 1:
            ((name, (a, b)),) = pairs.items()
            return a.unsqueeze(0), (b * self.settings[name].scale).unsqueeze(0)
        rank = max(a.shape[0] for a, _ in pairs.values())
        like = next(iter(pairs.values()))[0]
        stack_a, stack_b = [], []
        for name in names:
            if name not in pairs:
                stack_a.append(like.new_zeros(rank, self.in_features))
                stack_b.append(like.new_zeros(self.out_features, rank))
                continue
            a, b = pairs[name]
            stack_a.append(F.pad(a, (0, 0, 0, rank - a.shape[0])))
            stack_b.append(F.pad(b * self.settings[name].scale, (0, rank - a.shape[0])))
        return torch.stack(stack_a), torch.stack(stack_b)

    def _applied_weight(self) -> Tensor:
        if self.selection.ids is not None:
            raise UserError(
                "a module uses the weight of an adapted layer without calling it, and rows have adapters of their "
                "own, so there is no one weight; activate one adapter at a time"
            )
        return self.adapted_weight(self.selection.names[0])

    def adapted_weight(self, name: str) -> Tensor:
        """The base weight with an adapter folded in, in the base's layout and type."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        with torch.autocast(weight.device.type, enabled=False):
            delta = LowRank(*self._whole(name), self.settings[name].scale).delta()
            return (weight + (delta.t() if is_conv1d(self.base) else delta)).to(weight.dtype)

    @torch.no_grad()
    def merge(self, weight: Tensor) -> None:
        """Put :meth:`adapted_weight` into the base and keep the weight as it was."""
        own = self.base.get_parameter("weight")
        self.stored = own.detach().clone()
        own.copy_(weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weight that :meth:`merge` kept, bit for bit."""
        if self.stored is not None:
            self.base.get_parameter("weight").copy_(self.stored)
            self.stored = None

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: rank {self.factors(name)[0].shape[0]}, scale {setting.scale:g}"
            for name, setting in self.settings.items()
        )


def _rows(x: Tensor, ids: Tensor, adapters: int) -> TaskRows:
    """Rows brought together by adapter, ``[K, B, F]``."""
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
