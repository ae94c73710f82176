"""VarShare on a sequence: the posteriors of earlier tasks are the prior of the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.initial import INITIAL_RHO, check_positive
from varshare_rl.nn.parameters import total_kl
from varshare_rl.nn.varshare_lora import VarShareLoRALayer
from varshare_rl.ops.gaussian import inverse_softplus, softplus_sigma
from varshare_rl.registry import register
from varshare_rl.transfer.low_rank import (
    FrozenBase,
    Sigmas,
    adapter_bytes,
    adapter_of,
    adapter_state,
    check_learnt,
    correct,
    sigma_bytes,
    take_adapter,
    take_sigma,
)
from varshare_rl.transfer.method import (
    ContinualMethod,
    ContinualMethodConfig,
    NetworkSpec,
    Pretrained,
    StorageCost,
    frozen_eval,
)
from varshare_rl.transfer.share.layer_basis import Coefficients
from varshare_rl.transfer.share.posterior import align
from varshare_rl.types import Tree


class PriorFrom(Enum):
    """The prior of a new task's factors."""

    previous = "previous"  # the posterior of the task before: sequential Bayes
    pooled = "pooled"  # the Gaussian with the mean and the spread of all earlier posteriors together
    standard = "standard"  # zero mean and prior_scale


class PosteriorStart(Enum):
    """What the posterior of a new task starts as."""

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
    prior: PriorFrom = PriorFrom.previous
    "Prior of a new task: the posterior of the task before, `pooled` over all, or `standard` as for the first one."
    start: PosteriorStart = PosteriorStart.prior
    """What a task's posterior starts as: the base with little noise, the mean of the prior, or the posterior of the
    task whose policy does best."""
    prior_scale: float = bounded(1.0, above=0)
    "Standard deviation of the standard prior."
    kl_weight: float = bounded(0.001, least=0)
    "Weight of the divergence from the prior; 1 is the plain ELBO."

    def build(self, shape: NetworkSpec, pretrained: Pretrained | None = None) -> VarShareMethod:
        """The method."""
        return VarShareMethod(self, shape, pretrained)


@dataclass(frozen=True)
class Gaussians:
    """Prior of one layer's factors ``a [r, in], b [out, r]``, and the spread that a posterior at its mean gets."""

    mean: tuple[Tensor, Tensor]
    std: tuple[Tensor, Tensor]
    start_std: tuple[Tensor, Tensor]


class VarShareMethod(ContinualMethod):
    """``W_i = theta + (alpha / r) B_i A_i`` with a frozen ``theta`` and Gaussian factors for every task.

    The base is the pretrained agent's, or what the first task learns with all weights, which then has no posterior. The
    negative ELBO of a later task is its loss and ``kl_weight * KL(q_i || p_i) / n`` for ``n`` transitions, with a
    prior ``p_i`` of earlier posteriors (Nguyen et al. 2018, *Variational Continual Learning*, where it is that of
    the task before). :meth:`penalty` adds that divergence; the layers say ``paid_apart``, so that the ELBO of the
    run does not add it again. Policies are those of the posterior means, and never change by a bit.

    ``pooled`` moment-matches the earlier posteriors after :func:`~varshare_rl.transfer.share.posterior.align` has
    turned them to agree, ``m = mean_i mu_i`` and ``s^2 = mean_i (sigma_i^2 + (mu_i - m)^2)``. A posterior that
    starts at the prior's mean takes the spread of the posteriors, not that between them: noise of that size is what
    the earlier tasks were acted with. Corrections of a pretrained agent without posteriors count with the spread that fresh
    ones start with.

    Raises:
        UserError: earlier factors are to be compared with the new ones, and have another rank.
    """

    def __init__(
        self, config: VarShareMethodConfig, shape: NetworkSpec, pretrained: Pretrained | None = None
    ) -> None:
        super().__init__(config, shape, pretrained)
        alpha = 1.0 if config.alpha is None else config.alpha
        check_positive(rank=config.rank, alpha=alpha, prior_scale=config.prior_scale)
        self.base = FrozenBase(shape, pretrained)
        self.scale = 1.0 if config.alpha is None else config.alpha / config.rank
        self.adapters: list[Adapter] = (
            [] if pretrained is None else [dict(adapter) for adapter in pretrained.adapters]
        )
        self.sigmas: list[Sigmas] = [{} for _ in self.adapters]
        if pretrained is not None and pretrained.sigmas:
            self.sigmas = [dict(sigma) for sigma in pretrained.sigmas]
        if config.prior is not PriorFrom.standard or config.start is PosteriorStart.similar:
            self._check_ranks()

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """All weights for the first task without a pretrained agent, afterwards a posterior on the frozen base."""
        if self.base.weights is None:
            return self.base_network()
        config = self.config

        def layer(path: str, inputs: int, outputs: int) -> VarShareLoRALayer:
            made = VarShareLoRALayer(inputs, outputs, 1, config.rank, config.alpha, config.prior_scale)
            made.paid_apart = True
            prior = self.prior(path)
            if prior is not None:
                made.give_prior(list(zip(prior.mean, prior.std, strict=True)))
            if config.start is PosteriorStart.prior and prior is not None:
                _put(made, prior.mean, prior.start_std)
            if config.start is PosteriorStart.similar and similar is not None:
                check_learnt(similar, self.tasks)
                if path in self.adapters[similar]:
                    own = self._posterior(similar, path)
                    assert own.std_A is not None
                    assert own.std_B is not None
                    _put(made, (own.eps_A.t(), own.eps_B), (own.std_A.t(), own.std_B))
            return made

        return correct(self.base.network(), layer)

    def penalty(self, network: nn.Module, transitions: int) -> Tensor | float:
        """``kl_weight * KL / transitions``, the only place where this divergence is paid."""
        if self.config.kl_weight == 0.0:
            return 0.0
        weight: float = self.config.kl_weight / max(transitions, 1)
        return total_kl(network, 1) * weight

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the posterior, or the base."""
        if self.base.weights is None:
            self.base.keep(network)
        self.adapters.append(take_adapter(network))
        self.sigmas.append(take_sigma(network))
        self.tasks += 1

    def policy(self, task: int) -> nn.Module:
        """The base with the mean of the task's posterior."""
        check_learnt(task, self.tasks)
        return frozen_eval(self.base.corrected(self.adapters[task]))

    def sigma(self, task: int) -> Sigmas:
        """That of the task's posterior; nothing where it has none."""
        check_learnt(task, self.tasks)
        return self.sigmas[task]

    def stored(self) -> StorageCost:
        """The base, and the posteriors' means and spreads."""
        means = sum(adapter_bytes(adapter) for adapter in self.adapters)
        return StorageCost(self.base.bytes(), means + sum(sigma_bytes(sigma) for sigma in self.sigmas))

    def state(self) -> Tree:
        """The base unless it is the pretrained agent's, and the posteriors that were learnt here."""
        first = self.old_tasks
        return {
            "base": self.base.state(),
            "adapters": [adapter_state(adapter) for adapter in self.adapters[first:]],
            "spreads": [{path: list(pair) for path, pair in sigma.items()} for sigma in self.sigmas[first:]],
        }

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        first = self.old_tasks
        self.base.load_state(state["base"])
        self.adapters[first:] = [adapter_of(adapter) for adapter in state["adapters"]]
        self.sigmas[first:] = [{path: (a, b) for path, (a, b) in sigma.items()} for sigma in state["spreads"]]
        self.tasks = len(self.adapters)

    def prior(self, path: str) -> Gaussians | None:
        """The prior of the next task in one layer; None: the standard one."""
        earlier = [task for task, adapter in enumerate(self.adapters) if path in adapter]
        if not earlier or self.config.prior is PriorFrom.standard:
            return None
        if self.config.prior is PriorFrom.previous:
            own = self._posterior(earlier[-1], path)
            assert own.std_A is not None
            assert own.std_B is not None
            std = (own.std_A.t(), own.std_B)
            return Gaussians((own.eps_A.t(), own.eps_B), std, std)
        return pooled([self._posterior(task, path) for task in earlier], self.config.rank)

    def _posterior(self, task: int, path: str) -> Coefficients:
        """A task's factors in one layer as ``eps_B = b`` and ``eps_A = a^T``, in the scale of the new layers."""
        factors, sigma = self.adapters[task][path], self.sigmas[task].get(path)
        if sigma is None:
            initial = softplus_sigma(torch.tensor(INITIAL_RHO))
            sigma = (initial.expand_as(factors.a), initial.expand_as(factors.b))
        ratio = factors.scale / self.scale
        return Coefficients(factors.b * ratio, factors.a.t(), sigma[1] * ratio, sigma[0].t())

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
    """The Gaussian closest to all of some posteriors, ``sum_i KL(q_i || p)`` at its least, see the class above."""
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
def _put(layer: VarShareLoRALayer, means: tuple[Tensor, Tensor], stds: tuple[Tensor, Tensor]) -> None:
    """Start the posterior of a layer of one task at the given means and standard deviations."""
    for (mu, rho), mean, std in zip(layer.posteriors(), means, stds, strict=True):
        mu[0].copy_(mean)
        rho[0].copy_(inverse_softplus(std))
