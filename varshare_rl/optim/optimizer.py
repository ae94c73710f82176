"""The optimiser behind a step: which parameters learn at which rate, decay, and how rates change in a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from varshare_rl.optim.roles import Kind, Role


class Schedule(Enum):
    """How learning rates fall, once warm, with the share of ``total_transitions`` that is done."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class OptimizerOptions:
    """Options of ``optimizer``, for actor and critic. Rates are factors on their learning rates."""

    mean_rate: float = 1.0  # of the adapters' means
    spread_rate: float = 1.0  # of the adapters' spreads
    weight_decay: float = 0.0  # on weights that are no adapters, no biases and no norms
    schedule: Schedule = Schedule.constant
    warmup: float = 0.0  # share of the run in which rates rise from 0
    final_rate: float = 0.0  # what linear and cosine end at


def schedule_factor(options: OptimizerOptions, fraction: float) -> float:
    """Factor on every learning rate when ``fraction`` of the run is done.

    It rises linearly to 1 until ``fraction = warmup``. From there, with ``p`` the share done of what remains and
    ``e = final_rate``, it is 1 (constant), ``1 - (1 - e) p`` (linear), or ``e + (1 - e) (1 + cos(pi p)) / 2``
    (cosine; Loshchilov and Hutter 2017, without restarts).
    """
    fraction = min(max(fraction, 0.0), 1.0)
    if fraction < options.warmup:
        return fraction / options.warmup
    done = (fraction - options.warmup) / (1.0 - options.warmup)
    end = options.final_rate
    if options.schedule is Schedule.linear:
        return 1.0 - (1.0 - end) * done
    if options.schedule is Schedule.cosine:
        return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


class ScheduledAdam:
    """Fused Adam (Kingma and Ba 2015) in groups by rate and decay, and its rates in the course of a run.

    Decay is decoupled (AdamW; Loshchilov and Hutter 2019): ``theta -= learning_rate * weight_decay * theta``.

    Args:
        trained: the parameters with their roles.
        learning_rate: before factors.
        epsilon: Adam's.
        options: see :class:`OptimizerOptions`.
    """

    def __init__(
        self, trained: Sequence[Role], learning_rate: float, epsilon: float, options: OptimizerOptions
    ) -> None:
        self.options = options
        rates = {Kind.theta: 1.0, Kind.mean: options.mean_rate, Kind.spread: options.spread_rate}
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for role in trained:
            decay = options.weight_decay if role.decays else 0.0
            groups.setdefault((learning_rate * rates[role.kind], decay), []).append(role.parameter)
        self.rates = [rate for rate, _ in groups]
        described: list[dict[str, Any]] = [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ]
        kind = torch.optim.AdamW if options.weight_decay else torch.optim.Adam
        self.adam = kind(described, lr=learning_rate, eps=epsilon, fused=True)

    def advance(self, fraction: float) -> None:
        """Set the rates for when ``fraction`` of the run is done."""
        factor = schedule_factor(self.options, fraction)
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
