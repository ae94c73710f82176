"""VarShare on a sequence: the posteriors of earlier tasks are the prior of the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.adapters.adapter import adapter_scale
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.config import Posterior, PriorUnits
from varshare_rl.nn.layer import INITIAL_RHO, check_positive
from varshare_rl.nn.varshare_lora import VarShareLoRALayer
from varshare_rl.ops.gaussian import inverse_softplus, softplus_sigma
from varshare_rl.registry import register
from varshare_rl.transfer.bases import LowRankMethod, weighted_kl
from varshare_rl.transfer.low_rank import Sigmas, adapter_bytes, correct, sigma_bytes, take_sigma
from varshare_rl.transfer.method import ContinualMethodConfig, NetworkSpec, Pretrained, StorageCost
from varshare_rl.transfer.share.layer_basis import Coefficients
from varshare_rl.transfer.share.posterior import align
from varshare_rl.types import Tree

#: Of both factors of a layer: ``a [r, in], b [out, r]``.
Pair = tuple[Tensor, Tensor]


class PriorFrom(Enum):
    """Prior of a new task's factors."""

    previous = "previous"  # the posterior of the task before: sequential Bayes
    pooled = "pooled"  # the Gaussian with the mean and the variance of all earlier posteriors together
    standard = "standard"  # zero mean and prior_scale


class PosteriorStart(Enum):
    """Start of a new task's posterior."""

    fresh = "fresh"  # the base with the usual small noise
    prior = "prior"  # the mean of a prior of earlier posteriors; fresh without one
    similar = "similar"  # the posterior of the most similar earlier task; fresh without one


@register("method", "varshare")
@dataclass
class VarShareMethodConfig(ContinualMethodConfig):
    """``method=varshare``. Earlier posteriors are narrow priors, and under ``previous`` they hold a little tighter
    with every task, so the weight of the divergence is less than ``elbo.kl_weight``."""

    low_rank: ClassVar[bool] = True
    name: str = "varshare"
    rank: int = bounded(8, least=1)
    "Rank of the adapters."
    alpha: float | None = bounded(None, above=0)
    "Numerator of the adapters' scale; null: the rank."
    lr_scale: float = bounded(1.0, above=0)
    "Factor on the policy's learning rate once the base is frozen."
    prior: PriorFrom = PriorFrom.previous
    "Prior of a new task: the posterior of the task before, `pooled` over all, or `standard` as for the first one."
    start: PosteriorStart = PosteriorStart.prior
    """Start of a task's posterior: the base with little noise, the mean of the prior, or the posterior whose policy
    does best on it."""
    prior_scale: float = bounded(0.03, above=0)
    "Scale of the standard prior, in `prior_units`."
    prior_units: PriorUnits = PriorUnits.theta
    """Units of `prior_scale`: standard deviation of a correction's entries over that of a fresh layer's weights
    (`theta`), or of every Gaussian itself (`absolute`)."""
    kl_weight: float = bounded(0.001, least=0)
    "Weight of the divergence from the prior; 1 is the plain ELBO."

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> VarShareMethod:
        """Make the method."""
        return VarShareMethod(self, spec, pretrained)


@dataclass(frozen=True)
class Gaussians:
    """Prior of one layer's factors, and the standard deviation that a posterior at its mean starts with."""

    mean: Pair
    std: Pair
    start_std: Pair


class VarShareMethod(LowRankMethod):
    """``W_i = theta + (alpha / r) B_i A_i`` with a frozen ``theta`` and Gaussian factors for every task.

    What the first task learns with all weights has no posterior. The negative ELBO of a later task is its loss and
    ``kl_weight * KL(q_i || p_i) / n`` for ``n`` transitions, with a prior ``p_i`` of earlier posteriors (Nguyen et
    al. 2018, *Variational Continual Learning*, where it is that of the task before). :meth:`penalty` adds that
    divergence; the layers say ``paid_apart``, so that the ELBO of the run does not add it again. Policies are those
    of the posterior means, and never change by a bit.

    ``pooled`` moment-matches the earlier posteriors after :func:`~varshare_rl.transfer.share.posterior.align` has
    turned them to agree, ``m = mean_i mu_i`` and ``s^2 = mean_i (sigma_i^2 + (mu_i - m)^2)``. A posterior that
    starts at the prior's mean takes the mean variance of the posteriors, without that between them: noise of that
    size is what the earlier tasks were acted with. Corrections of a pretrained agent without posteriors count with
    the standard deviation that fresh ones start with.

    Raises:
        UserError: earlier factors are to be compared with the new ones, and have another rank.
    """

    def __init__(
        self, config: VarShareMethodConfig, spec: NetworkSpec, pretrained: Pretrained | None = None
    ) -> None:
        super().__init__(config, spec, pretrained)
        check_positive(prior_scale=config.prior_scale)
        self.scale = adapter_scale(config.alpha, config.rank, rslora=False)
        self.sigmas: list[Sigmas] = [{} for _ in self.adapters]
        if pretrained is not None and pretrained.sigmas:
            self.sigmas = [dict(sigma) for sigma in pretrained.sigmas]
        if config.prior is not PriorFrom.standard or config.start is PosteriorStart.similar:
            self._check_ranks()

    def corrected(self, similar: int | None) -> nn.Module:
        """Make the base with a posterior that starts as ``start`` says."""
        config = self.config
        standard = Posterior(config.prior_scale, config.prior_units)

        def layer(path: str, inputs: int, outputs: int) -> VarShareLoRALayer:
            scale = standard.factor_scale(inputs, config.rank, self.scale)
            made = VarShareLoRALayer(inputs, outputs, 1, config.rank, config.alpha, scale)
            made.paid_apart = True
            prior = self.prior(path)
            if prior is not None:
                made.give_prior(list(zip(prior.mean, prior.std, strict=True)))
            if config.start is PosteriorStart.prior and prior is not None:
                _put(made, prior.mean, prior.start_std)
            if config.start is PosteriorStart.similar and similar is not None and path in self.adapters[similar]:
                _put(made, *self._posterior(similar, path))
            return made

        return correct(self.base.network(), layer)

    def starts_from(self, similar: int | None = None) -> int | None:
        """Return the last task where a posterior starts at the mean of its, which is the prior."""
        config = self.config
        previous = config.start is PosteriorStart.prior and config.prior is PriorFrom.previous
        return self.tasks - 1 if previous and self.tasks else super().starts_from(similar)

    def penalty(self, network: nn.Module, transitions: int) -> Tensor | float:
        """Return ``kl_weight * KL / transitions``; nothing else pays for this divergence."""
        return weighted_kl(network, self.config.kl_weight, transitions)

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the posterior, or the base."""
        super().end(network, inputs)
        self.sigmas.append(take_sigma(network))

    def sigma(self, task: int) -> Sigmas:
        """Return that of the task's posterior; nothing where it has none."""
        self.check_learnt(task)
        return self.sigmas[task]

    def stored(self) -> StorageCost:
        """Return the bytes of the base, and of the posteriors' means and standard deviations."""
        means = sum(adapter_bytes(adapter) for adapter in self.adapters)
        return StorageCost(self.base.bytes(), means + sum(sigma_bytes(sigma) for sigma in self.sigmas))

    def state(self) -> Tree:
        """Return the base and the posteriors, but for what the pretrained agent gives."""
        own = self.sigmas[self.old_tasks :]
        return {**super().state(), "spreads": [{path: list(pair) for path, pair in each.items()} for each in own]}

    def load_state(self, state: Tree) -> None:
        super().load_state(state)
        own = [{path: (a, b) for path, (a, b) in sigma.items()} for sigma in state["spreads"]]
        self.sigmas[self.old_tasks :] = own

    def prior(self, path: str) -> Gaussians | None:
        """Return the prior of the next task in one layer; None: the standard one."""
        earlier = [task for task, adapter in enumerate(self.adapters) if path in adapter]
        if not earlier or self.config.prior is PriorFrom.standard:
            return None
        if self.config.prior is PriorFrom.previous:
            mean, std = self._posterior(earlier[-1], path)
            return Gaussians(mean, std, std)
        posteriors = [self._posterior(task, path) for task in earlier]
        return pooled([Coefficients(b, a.t(), std_b, std_a.t()) for (a, b), (std_a, std_b) in posteriors],
                      self.config.rank)  # fmt: skip

    def _posterior(self, task: int, path: str) -> tuple[Pair, Pair]:
        """Return means and standard deviations of a task's factors in one layer, in the scale of the new layers."""
        factors, sigma = self.adapters[task][path], self.sigmas[task].get(path)
        if sigma is None:
            initial = softplus_sigma(torch.tensor(INITIAL_RHO))
            sigma = (initial.expand_as(factors.a), initial.expand_as(factors.b))
        ratio = factors.scale / self.scale
        return (factors.a, factors.b * ratio), (sigma[0], sigma[1] * ratio)

    def _check_ranks(self) -> None:
        for adapter in self.adapters:
            for factors in adapter.values():
                if factors.rank != self.config.rank:
                    raise UserError(
                        f"method.rank is {self.config.rank}, and the corrections to start from have rank "
                        f"{factors.rank}; give method.rank={factors.rank}, or method.prior=standard with "
                        "method.start=fresh"
                    )


def pooled(posteriors: Sequence[Coefficients], rank: int) -> Gaussians:
    """Return the Gaussian closest to all of some posteriors, with ``sum_i KL(q_i || p)`` at its least.

    See :class:`VarShareMethod`; a posterior is ``eps_B = b`` and ``eps_A = a^T``.
    """
    aligned = align(posteriors, rank)
    means, stds, starts = [], [], []
    for mus, variances in (aligned[2:], aligned[:2]):  # a, then b
        mean, within = mus.mean(0), variances.mean(0)
        means.append(mean.float())
        stds.append((within + (mus - mean).square().mean(0)).sqrt().float())
        starts.append(within.sqrt().float())
    (mean_a, mean_b), (std_a, std_b), (start_a, start_b) = means, stds, starts
    return Gaussians((mean_a.t(), mean_b), (std_a.t(), std_b), (start_a.t(), start_b))


@torch.no_grad()
def _put(layer: VarShareLoRALayer, means: Pair, stds: Pair) -> None:
    """Start the posterior of a layer of one task at the given means and standard deviations."""
    for (mu, rho), mean, std in zip(layer.posteriors(), means, stds, strict=True):
        mu[0].copy_(mean)
        rho[0].copy_(inverse_softplus(std))
