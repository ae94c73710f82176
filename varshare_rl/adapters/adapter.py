"""Low-rank adapters in memory: factors by module path, and a file's statements about them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor

from varshare_rl.errors import UserError
from varshare_rl.nn.layer import linear_parameters
from varshare_rl.ops.low_rank import LowRank as LowRank
from varshare_rl.ops.low_rank import wide_dtype

_Number = TypeVar("_Number", int, float)

#: Factors by the dotted path of the linear module that they correct.
Adapter = dict[str, LowRank]


@dataclass(frozen=True)
class AdapterInfo:
    """Statements of an adapter file about its factors, in the words of the `peft` library.

    Attributes:
        base_model: name or path of the model that is adapted; None if nobody said.
        rank, alpha: of all modules but those in the patterns.
        rank_pattern, alpha_pattern: rank and alpha by regular expression; the first that matches a module's path
            or a dotted end of it counts, then a key that is the path itself.
        rslora: scale ``alpha / sqrt(r)`` (Kalajdzievski 2023) instead of ``alpha / r``.
        dropout: on the adapter's input, in training.
        target_modules: the adapted modules, as path ends in a list or as one regular expression.
        fan_in_fan_out: base weights are stored ``[in, out]``, as in GPT-2; factors are not.
    """

    base_model: str | None = None
    rank: int = 8
    alpha: float = 8.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ()
    fan_in_fan_out: bool = False

    def rank_of(self, module: str) -> int:
        """Return the rank that is stated for a module's path."""
        return _first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the alpha that is stated for a module's path."""
        return _first_match(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """Return the factor on ``b a`` that follows, see :func:`adapter_scale`."""
        return adapter_scale(self.alpha_of(module), self.rank_of(module), self.rslora)


class AdapterInit(Enum):
    """Start of an adapter's factors. The first two correct nothing, ``b = 0``; the others are a part of the base
    weight, which is subtracted from it."""

    kaiming = "kaiming"  # a uniform on +-1 / sqrt(in) (Hu et al. 2021)
    gaussian = "gaussian"  # a from N(0, (1 / r)^2), as peft has it
    pissa = "pissa"  # the first singular values and vectors of the base weight (Meng et al. 2024)
    olora = "olora"  # the first columns of its QR decomposition (Bueyuekakyuez 2024)

    @property
    def principal(self) -> bool:
        """True for a start from the base weight."""
        return self in (AdapterInit.pissa, AdapterInit.olora)


def fresh_adapter(
    layers: Mapping[str, Any], rank: int, scale: float, init: AdapterInit = AdapterInit.kaiming
) -> Adapter:
    """Make a correction of nothing: ``b = 0``, and ``a`` as ``init`` (``kaiming`` or ``gaussian``) says.

    ``layers`` have ``in_features`` and ``out_features``.
    """

    def start(inputs: int) -> Tensor:
        if init is AdapterInit.gaussian:
            return torch.randn(rank, inputs) / rank
        return linear_parameters(inputs, rank, bias=False)[0].detach()

    return {
        path: LowRank(start(layer.in_features), torch.zeros(layer.out_features, rank), scale)
        for path, layer in layers.items()
    }


def principal_factors(weight: Tensor, rank: int, scale: float, init: AdapterInit) -> LowRank:
    """Return the part ``scale b a`` of a base weight ``[out, in]`` that PiSSA or OLoRA starts from, as `peft` does.

    PiSSA: ``U sqrt(S / scale)`` and ``sqrt(S / scale) V^T`` of the first ``rank`` singular triples. OLoRA: the
    first columns of ``Q`` and rows of ``R``.

    Raises:
        UserError: the weight has a lower rank.
    """
    if rank > min(weight.shape):
        raise UserError(f"init={init.value} with rank {rank}: a weight of {tuple(weight.shape)} has a lower one")
    weight = weight.detach().to(wide_dtype(weight.dtype))
    if init is AdapterInit.olora:
        q, triangle = torch.linalg.qr(weight)
        return LowRank(triangle[:rank].contiguous(), q[:, :rank].contiguous(), scale)
    u, singular, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (singular[:rank] / scale).sqrt()
    return LowRank(root[:, None] * vh[:rank], u[:, :rank] * root, scale)


def adapter_scale(alpha: float | None, rank: int, rslora: bool) -> float:
    """Return ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA; None: ``alpha`` is ``r``."""
    alpha = rank if alpha is None else alpha
    return alpha / (math.sqrt(rank) if rslora else rank)


def describe(
    adapter: Adapter, base_model: str | None = None, rslora: bool = False, dropout: float = 0.0
) -> AdapterInfo:
    """Return the information that states an adapter's ranks and scales exactly.

    The most frequent rank and alpha hold for all; exceptions become patterns that match one module each, as
    does ``target_modules``: a plain name would match every path that ends with it.

    Raises:
        UserError: the adapter has no factors.
    """
    if not adapter:
        raise UserError("the adapter has no factors; give those of at least one module")
    ranks = {module: factors.rank for module, factors in adapter.items()}
    alphas = {module: _alpha(factors.scale, factors.rank, rslora) for module, factors in adapter.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return AdapterInfo(
        base_model=base_model,
        rank=int(rank),
        alpha=alpha,
        rank_pattern={_exactly(module): value for module, value in ranks.items() if value != rank},
        alpha_pattern={_exactly(module): value for module, value in alphas.items() if value != alpha},
        rslora=rslora,
        dropout=dropout,
        target_modules=f"^(?:{'|'.join(re.escape(module) for module in adapter)})$",
    )


def matches(pattern: str, module: str) -> bool:
    """Return True if a rank or alpha pattern speaks of a module's path, as `peft` decides it."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _first_match(patterns: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    found = (value for pattern, value in patterns.items() if matches(pattern, module))
    return next(found, patterns.get(module, default))


def _exactly(module: str) -> str:
    return f"^{re.escape(module)}$"


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """Return the shortest alpha that gives this scale: ``scale * rank`` may differ in its last digit by module."""
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    short = float(f"{alpha:.12g}")
    return short if math.isclose(adapter_scale(short, rank, rslora), scale, rel_tol=1e-15) else alpha
