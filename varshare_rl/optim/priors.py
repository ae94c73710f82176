"""Movement of the scale of the residuals' prior during training: ``elbo/prior=``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varshare_rl.fields import bounded, check_below
from varshare_rl.nn.variational import VariationalLayer, stochastic_layers
from varshare_rl.registry import register
from varshare_rl.state import Stateful
from varshare_rl.types import Metrics

#: Per task ``[T]``: critic loss with theta alone minus critic loss with the residuals.
LossGap = Callable[[], Tensor]


class Prior(Stateful):
    """Scales that stay as they are, unless a subclass moves them. They live in the layers."""

    moves = False  # True: updates move the scales

    def step(self, modules: Iterable[nn.Module], gap: LossGap) -> None:
        """After a gradient update: move the scales of the layers inside ``modules``."""

    def metrics(self, modules: Iterable[nn.Module]) -> Metrics:
        """Return numbers to log, without their ``elbo/`` in front."""
        return {}


def _layers(modules: Iterable[nn.Module]) -> list[VariationalLayer]:
    return [layer for module in modules for _, layer in stochastic_layers(module)]


@register("elbo/prior", "fixed")
@dataclass
class FixedPriorConfig:
    """``elbo/prior=fixed``: ``elbo.prior_scale`` throughout."""

    name: str = "fixed"

    def build(self, prior_scale: float, num_tasks: int) -> Prior:
        """Return the prior."""
        return Prior()


@register("elbo/prior", "learned")
@dataclass
class LearnedPriorConfig:
    """``elbo/prior=learned``: one scale ``p`` per layer, by empirical Bayes.

    Gradient steps in ``log p`` on the mean divergence per Gaussian weight plus a spring to the start:

        mean_i KL_i / n + spring / 2 * (log p - log prior_scale)^2,    gradient 1 - m / p^2 + spring * (...)

    with ``m`` the mean of ``mu^2 + sigma^2`` over tasks and entries. Without the spring the optimum is the root of
    ``m``. Steps are bounded by ``rate`` (a posterior far narrower than its prior has a gradient near 1, a wider one
    an unbounded one) and taken every ``interval`` updates.
    """

    name: str = "learned"
    rate: float = bounded(0.01, least=0)
    "Largest step in the logarithm of the scale."
    spring: float = bounded(0.01, least=0)
    "Strength of the pull to `elbo.prior_scale`."
    interval: int = bounded(10, least=1)
    "Updates between steps."

    def build(self, prior_scale: float, num_tasks: int) -> Prior:
        """Return the prior."""
        return _Learned(self, prior_scale)


class _Learned(Prior):
    state_fields = ("steps",)
    moves = True

    def __init__(self, config: LearnedPriorConfig, prior_scale: float) -> None:
        self.config, self.home = config, math.log(prior_scale)
        self.steps = 0

    @torch.no_grad()
    def step(self, modules: Iterable[nn.Module], gap: LossGap) -> None:
        self.steps += 1
        if self.steps % self.config.interval != 0:
            return
        for layer in _layers(modules):
            log_scale = layer.log_prior_scale.mean()
            slope = 1.0 - layer.second_moment().mean() * torch.exp(-2.0 * log_scale)
            slope = slope + self.config.spring * (log_scale - self.home)
            layer.log_prior_scale.fill_(log_scale - self.config.rate * slope.clamp(-1.0, 1.0))

    def metrics(self, modules: Iterable[nn.Module]) -> Metrics:
        scales = [float(layer.log_prior_scale.mean().exp()) for layer in _layers(modules)]
        if not scales:
            return {}
        return {
            "prior_scale": sum(scales) / len(scales),
            "prior_scale_least": min(scales),
            "prior_scale_most": max(scales),
        }


@register("elbo/prior", "adaptive")
@dataclass
class AdaptivePriorConfig:
    """``elbo/prior=adaptive``: one scale per task, wide where the residuals help the critic.

    Every ``interval`` updates the gap of each task, critic loss with theta alone minus critic loss with the
    residuals, enters a moving average. Its robust z-score over tasks, ``(gap - median) / (1.4826 MAD)``, is
    squashed by a sigmoid into ``[least, most]``. A gap that is not finite does not count; a task that has had no
    other is taken for the median.
    """

    name: str = "adaptive"
    least: float = bounded(0.01, above=0)
    "Least scale."
    most: float = 0.3
    "Largest scale."
    smoothing: float = bounded(0.05, least=0, most=1)
    "Weight of the newest gap in its moving average."
    interval: int = bounded(20, least=1)
    "Updates between looks at the gap."

    def check(self, prefix: str) -> None:
        """Raise UserError for bounds of the scale that are crossed."""
        check_below(self, prefix, "least", "most")

    def build(self, prior_scale: float, num_tasks: int) -> Prior:
        """Return the prior."""
        return _Adaptive(self, num_tasks)


class _Adaptive(Prior):
    state_fields = ("gap", "steps")
    moves = True

    def __init__(self, config: AdaptivePriorConfig, num_tasks: int) -> None:
        self.config = config
        self.gap = torch.full((num_tasks,), math.nan)
        self.steps = 0

    @torch.no_grad()
    def step(self, modules: Iterable[nn.Module], gap: LossGap) -> None:
        self.steps += 1
        if self.steps % self.config.interval != 0:
            return
        newest = gap().cpu()
        newest = torch.where(newest.isfinite(), newest, self.gap)
        old = torch.where(self.gap.isnan(), newest, self.gap)
        self.gap = old + self.config.smoothing * (newest - old)
        scale = self.scales()
        for layer in _layers(modules):
            layer.log_prior_scale.copy_(scale.log())

    def scales(self) -> Tensor:
        """The prior scale of every task, ``[T]``."""
        middle = self.gap.nanquantile(0.5)
        deviation = 1.4826 * (self.gap - middle).abs().nanquantile(0.5)
        z = ((self.gap - middle) / deviation.clamp_min(1e-8)).nan_to_num(0.0)
        return self.config.least + (self.config.most - self.config.least) * torch.sigmoid(z)

    def metrics(self, modules: Iterable[nn.Module]) -> Metrics:
        if bool(self.gap.isnan().all()):
            return {}
        scales = self.scales()
        return {
            "loss_gap": float(self.gap.nanmean()),
            "prior_scale": float(scales.mean()),
            "prior_scale_least": float(scales.min()),
            "prior_scale_most": float(scales.max()),
        }
