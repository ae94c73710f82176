"""Absorption during training, and what becomes of the optimiser's moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.absorb import Absorption, absorb
from varshare_rl.types import Metrics


@dataclass
class AbsorbConfig:
    """Options of ``elbo.absorb``: the mean of the residuals moves into the shared weights."""

    every: int = bounded(0, least=0)
    "Gradient updates between moves of the residuals' common part into the shared weights; 0: never."
    rate: float = bounded(0.1, least=0, most=1)
    "Share of the common part that moves."
    max_error: float = bounded(0.05, least=0)
    "A layer is left alone when a task's residual would change by more than this share."

    def check(self, prefix: str) -> None:
        """Raise UserError for moves that move nothing."""
        if self.every and self.rate == 0:
            raise UserError(f"{prefix}rate is 0, which moves nothing; give up to 1, or {prefix}every=0")

    def due(self, updates_before: int, updates: int) -> bool:
        """Return True when the count of gradient updates has passed a multiple of ``every``."""
        return self.every > 0 and updates // self.every > updates_before // self.every


@dataclass(frozen=True)
class Absorbing:
    """A trained module, its optimisers, and the slow copy that follows it."""

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    target_module: nn.Module | None = None


def absorb_all(parts: Mapping[str, Absorbing], config: AbsorbConfig) -> Metrics:
    """Absorb in every part and return what to log.

    ``absorb/error`` is the largest error of a task in a layer that changed, ``absorb/moved`` the mean over layers
    of the move relative to the shared weight (0 for a layer left alone), ``absorb/layers`` the share of layers that
    changed, and ``absorb_error/<layer>`` the largest error of each, also where it was too large.

    Adam's moments of shared weights and of full-rank residuals stay: their gradients are functions of the weights
    ``W_i``, which have not moved. The gradient of a factor scales with the other factor, which has; so the moments
    of a changed layer's factors start afresh, bias correction included: old second moments under new, larger
    gradients would make steps many times the learning rate.
    """
    done: dict[str, Absorption] = {}
    for part_name, part in parts.items():
        layers = absorb(part.module, config.rate, config.max_error, part.target_module)
        for name, absorption in layers.items():
            done[f"{part_name}.{name}"] = absorption
            for parameter in absorption.rescaled:
                rescaled_parameter = part.module.get_submodule(name).get_parameter(parameter)
                for optimizer in part.optimizers:
                    optimizer.state.pop(rescaled_parameter, None)
    if not done:
        return {}
    changed = [absorption for absorption in done.values() if absorption.done]
    metrics = {
        "absorb/error": max((float(absorption.error.max()) for absorption in changed), default=0.0),
        "absorb/moved": sum(absorption.share for absorption in changed) / len(done),
        "absorb/layers": len(changed) / len(done),
    }
    return metrics | {f"absorb_error/{name}": float(absorption.error.max()) for name, absorption in done.items()}
