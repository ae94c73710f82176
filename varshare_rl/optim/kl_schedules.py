"""Movement of the divergence's weight during training: ``elbo/schedule=``.

A schedule holds the weight, which multiplies the nats of each network, ``[T]``. Once per gradient update it sees
the nats of all networks together and may move it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.errors import UserError
from varshare_rl.fields import bounded, check_below
from varshare_rl.nn.variational import noise_to_weight
from varshare_rl.registry import register
from varshare_rl.state import Stateful
from varshare_rl.types import Metrics


class KLSchedule(Stateful):
    """A weight on the nats of every network: constant, unless a subclass moves it."""

    state_fields: ClassVar[tuple[str, ...]] = ()  # a weight that updates do not move is that of the options
    reacts = False  # True: updates move the weight
    free_nats: float | None = None  # nats of every task and network that cost nothing

    def __init__(self, kl_weight: float | Tensor) -> None:
        self.weight = kl_weight  # or one per task, [T] on the CPU

    def advance(self, fraction: float) -> None:
        """Take note of the share of total_transitions that is done."""

    def step(self, nats: Tensor, modules: Mapping[str, nn.Module]) -> None:
        """After a gradient update: ``nats [T]`` of all networks together, and the networks."""

    def metrics(self) -> Metrics:
        """Return numbers to log, without their ``elbo/`` in front."""
        return {"kl_weight": float(self.weight.mean() if isinstance(self.weight, Tensor) else self.weight)}


@register("elbo/schedule", "constant")
@dataclass
class ConstantConfig:
    """``elbo/schedule=constant``: ``elbo.kl_weight`` throughout."""

    name: str = "constant"

    def build(self, kl_weight: float, num_tasks: int) -> KLSchedule:
        """Return the schedule."""
        return KLSchedule(kl_weight)


@register("elbo/schedule", "ramp")
@dataclass
class RampConfig:
    """``elbo/schedule=ramp``: up from 0 to ``kl_weight``, hold, then up to ``late_factor * kl_weight``.

    The first rise takes the share ``warmup`` of the transitions, the last one the share ``late``; both linear.
    """

    name: str = "ramp"
    warmup: float = bounded(0.1, least=0, most=1)
    "Share of the budget for the first rise."
    late: float = bounded(0.2, least=0, most=1)
    "Share of the budget for the second rise, at its end."
    late_factor: float = bounded(2.0, least=0)
    "End of the second rise, times `elbo.kl_weight`."

    def check(self, prefix: str) -> None:
        """Raise UserError for rises that overlap."""
        if self.warmup + self.late > 1:
            raise UserError(f"{prefix}warmup + late is {self.warmup + self.late:g}; it must be at most 1")

    def build(self, kl_weight: float, num_tasks: int) -> KLSchedule:
        """Return the schedule."""
        return _Ramp(self, kl_weight)


class _Ramp(KLSchedule):
    def __init__(self, config: RampConfig, kl_weight: float) -> None:
        super().__init__(kl_weight)
        self.config, self.full = config, kl_weight
        self.advance(0.0)

    def advance(self, fraction: float) -> None:
        warmup, late, top = self.config.warmup, self.config.late, self.config.late_factor
        rise = min(fraction / warmup, 1.0) if warmup > 0 else 1.0
        end = max(fraction - (1.0 - late), 0.0) / late if late > 0 else 0.0
        self.weight = self.full * (rise + (top - 1.0) * min(end, 1.0))


@register("elbo/schedule", "band")
@dataclass
class BandConfig:
    """``elbo/schedule=band``: keep the residuals' sigma within a band relative to the shared weights.

    The measure is the noise-to-weight ratio, the root mean square of the noise in ``s B A`` over that of ``theta``,
    averaged over layers and tasks and smoothed. Every ``interval`` updates a ratio outside the band multiplies the
    weight by ``factor`` or divides it. Which of the two brings the ratio back depends on the prior: a larger weight
    pulls sigma towards the prior's scale, so it lowers the ratio where the prior's scale is the smaller one and
    raises it where it is the larger one.
    """

    name: str = "band"
    low: float = bounded(0.01, least=0)
    "Least noise-to-weight ratio; at its prior a posterior has `elbo.prior_scale`."
    high: float = 0.05
    "Largest noise-to-weight ratio."
    factor: float = bounded(1.1, least=1)
    "Factor on the weight when the ratio is outside."
    interval: int = bounded(20, least=1)
    "Updates between looks at the ratio."
    smoothing: float = bounded(0.05, least=0, most=1)
    "Weight of the newest ratio in its moving average."
    least: float = bounded(1e-6, above=0)
    "Least weight."
    most: float = 1e3
    "Largest weight."

    def check(self, prefix: str) -> None:
        """Raise UserError for bounds of the ratio or of the weight that are crossed."""
        check_below(self, prefix, "low", "high")
        check_below(self, prefix, "least", "most")

    def build(self, kl_weight: float, num_tasks: int) -> KLSchedule:
        """Return the schedule."""
        return _Band(self, kl_weight)


class _Band(KLSchedule):
    state_fields = ("weight", "ratio", "prior_ratio", "steps")
    reacts = True

    def __init__(self, config: BandConfig, kl_weight: float) -> None:
        super().__init__(kl_weight)
        self.config = config
        self.ratio = self.prior_ratio = math.nan
        self.steps = 0

    def step(self, nats: Tensor, modules: Mapping[str, nn.Module]) -> None:
        self.steps += 1
        config = self.config
        if self.steps % config.interval != 0:
            return
        ratio, self.prior_ratio = noise_to_weight(modules.values())
        old = ratio if math.isnan(self.ratio) else self.ratio
        self.ratio = old + config.smoothing * (ratio - old)
        if config.low <= self.ratio <= config.high:
            return
        wants_more = self.ratio < config.low
        prior_is_larger = self.prior_ratio > self.ratio
        factor = config.factor if wants_more == prior_is_larger else 1.0 / config.factor
        self.weight = min(max(float(self.weight) * factor, config.least), config.most)

    def metrics(self) -> Metrics:
        return super().metrics() | {"noise_to_weight": self.ratio, "prior_noise_to_weight": self.prior_ratio}


@register("elbo/schedule", "dual")
@dataclass
class DualConfig:
    """``elbo/schedule=dual``: hold the nats per task, of all networks together, at a budget.

    The weight is the multiplier of the constraint ``KL = budget`` and follows its violation, as in dual ascent,
    on a logarithmic scale: ``weight = exp(m) * (KL / budget)^gain`` with ``m += rate * log(KL / budget)`` after
    each update. The second factor reacts at once and damps. In ``m`` a violation counts as 20 % at most, so that a
    fresh network far above its budget does not wind the weight up. A budget above what the tasks take at weight 0
    cannot be held: the weight then falls to ``least``.
    """

    name: str = "dual"
    budget_nats: float = bounded(1000.0, above=0)
    "Nats per task, of all networks together, that the divergence is held at."
    per_task: bool = False
    "Hold every task, with a weight of its own, instead of the mean over tasks."
    rate: float = bounded(0.02, least=0)
    "Step of the multiplier's logarithm."
    gain: float = bounded(3.0, least=0)
    "Exponent of the factor that acts at once."
    least: float = bounded(1e-6, above=0)
    "Least weight."
    most: float = 1e3
    "Largest weight."

    def check(self, prefix: str) -> None:
        """Raise UserError for bounds of the weight that are crossed."""
        check_below(self, prefix, "least", "most")

    def build(self, kl_weight: float, num_tasks: int) -> KLSchedule:
        """Return the schedule."""
        return _Dual(self, kl_weight, num_tasks)


_BOUND = math.log(1.2)  # what a violation counts as at most in the multiplier


class _Dual(KLSchedule):
    state_fields = ("weight", "log_multiplier")
    reacts = True

    def __init__(self, config: DualConfig, kl_weight: float, num_tasks: int) -> None:
        super().__init__(torch.full((num_tasks,), max(kl_weight, config.least)))
        self.config = config
        self.log_multiplier = torch.as_tensor(self.weight).log()

    def step(self, nats: Tensor, modules: Mapping[str, nn.Module]) -> None:
        config = self.config
        held = nats.cpu() if config.per_task else nats.mean().cpu().expand(len(nats))
        violation = (held / config.budget_nats).clamp_min(1e-12).log()
        moved = self.log_multiplier + config.rate * violation.clamp(-_BOUND, _BOUND)
        self.log_multiplier = moved.clamp(math.log(config.least), math.log(config.most))
        weight = (self.log_multiplier + config.gain * violation).exp()
        self.weight = weight.clamp(config.least, config.most)


@register("elbo/schedule", "free_bits")
@dataclass
class FreeBitsConfig:
    """``elbo/schedule=free_bits``: the first ``free_nats`` of every task and network cost nothing.

    ``kl_weight * max(KL_i - free_nats, 0)`` (after Kingma et al. 2016, with a task in place of a latent group).
    """

    name: str = "free_bits"
    free_nats: float = bounded(500.0, least=0)
    "Nats of every task and network that cost nothing."

    def build(self, kl_weight: float, num_tasks: int) -> KLSchedule:
        """Return the schedule."""
        return _FreeBits(self, kl_weight)


class _FreeBits(KLSchedule):
    def __init__(self, config: FreeBitsConfig, kl_weight: float) -> None:
        super().__init__(kl_weight)
        self.free_nats = config.free_nats
