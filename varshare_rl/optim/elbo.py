"""The negative ELBO's penalty: weighted divergences of the tasks' posteriors from their priors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.config import Posterior, PosteriorStart, PriorUnits
from varshare_rl.nn.layer import TaskModule, penalized_layers
from varshare_rl.nn.variational import Estimator, summed_kl
from varshare_rl.nn.weight_sampler import Resample
from varshare_rl.optim.absorption import AbsorbConfig
from varshare_rl.optim.kl_schedules import ConstantConfig, KLSchedule
from varshare_rl.optim.priors import FixedPriorConfig, LossGap, Prior
from varshare_rl.state import Stateful
from varshare_rl.types import Metrics


class KLNormalization(Enum):
    """Choices of ``n_i``, the divisor of a task's divergence."""

    data = "data"  # transitions of this task that the loss averages over: of PPO's rollout, of SAC's replay
    seen = "seen"  # those so far, each counted once
    budget = "budget"  # those of the whole run
    parameters = "parameters"  # parameters of this task's posterior
    none = "none"  # 1


class Likelihood(Enum):
    """Scales of the likelihoods that the losses stand for."""

    fitted = "fitted"  # Gaussian values of the variance that is left; SAC's policy at its entropy coefficient
    unit = "unit"  # none: a nat costs as much as 1 of the loss


class Penalized(Enum):
    """Networks whose divergence is in the loss."""

    both = "both"
    actor = "actor"
    critic = "critic"


class TargetDraw(Enum):
    """Weights that targets (SAC) and advantages (PPO) are computed with."""

    mean = "mean"
    sample = "sample"


@dataclass
class DrawConfig:
    """Options of ``elbo.draw``: the weights that acting, targets and evaluation use."""

    acting: Resample = Resample.per_update
    "Weights of the policy while it collects experience."
    targets: TargetDraw = TargetDraw.mean
    "Weights of targets (SAC) and advantages (PPO)."
    evaluation: Resample = Resample.mean
    "Weights of the policy in evaluation."


@dataclass
class ElboConfig:
    """Options of ``elbo``: the weight of the divergence and how it moves, the posteriors and how they are drawn."""

    kl_weight: float = bounded(0.1, least=0)
    "Weight of the divergence; 1 is the plain ELBO of the data met so far, less a tempered (cold) posterior."
    normalization: KLNormalization = KLNormalization.seen
    """Divisor `n_i` of a task's divergence: its transitions so far (`seen`); those of PPO's rollout or SAC's replay
    (`data`); those of the whole run (`budget`); the Gaussians of its posterior; or 1."""
    likelihood: Likelihood = Likelihood.fitted
    """Scale of the likelihoods that the losses stand for: `fitted`, values with the variance that the critic leaves
    and SAC's policy with its entropy coefficient as temperature; or `unit`, a nat costs 1 of the loss."""
    networks: Penalized = Penalized.both
    "Networks whose divergence is in the loss; the posteriors of the other are free."
    prior_scale: float = bounded(0.03, above=0)
    "Scale of the prior, in `prior_units`."
    prior_units: PriorUnits = PriorUnits.theta
    """Units of `prior_scale`: standard deviation of a residual's entries over that of theta's at the start
    (`theta`), which means the same at every width, rank and alpha; or of every Gaussian itself (`absolute`)."""
    start: PosteriorStart = PosteriorStart.prior
    "Standard deviations that posteriors start with: those of their priors, which cost nothing, or 0.0067."
    temperature: float = bounded(1.0, least=0)
    "Factor on the noise of draws."
    estimator: Estimator | None = None
    "Estimator of training passes; null: the network's own."
    weight_samples: int = bounded(1, least=1)
    "Draws per task and training pass, of the estimators `weight` and `flipout`."
    draw: DrawConfig = field(default_factory=DrawConfig)
    "Draws of the weights."
    schedule: Any = field(default_factory=ConstantConfig)
    "Schedule of the weight: `elbo/schedule=<name>`, with options of its own."
    prior: Any = field(default_factory=FixedPriorConfig)
    "Schedule of the prior's scale: `elbo/prior=<name>`, with options of its own."
    absorb: AbsorbConfig = field(default_factory=AbsorbConfig)
    "Absorption of the residuals' common part."

    def check(self, prefix: str) -> None:
        """Raise UserError for a schedule or prior chosen with a dot, and a weight that no schedule can move."""
        for part in ("schedule", "prior"):
            given = getattr(self, part)
            if not is_dataclass(given):
                raise UserError(f"{prefix}{part} is {given}; choose one with a slash: elbo/{part}={given}")
        if self.kl_weight == 0 and not isinstance(self.schedule, ConstantConfig):
            raise UserError(
                f"{prefix}kl_weight is 0, from which elbo/schedule={self.schedule.name} cannot start; "
                "give a positive weight"
            )

    def posterior(self) -> Posterior:
        """Return the part that the layers are built from."""
        estimator = None if self.estimator is None else self.estimator.value
        return Posterior(
            self.prior_scale, self.prior_units, self.start, estimator, self.temperature, self.weight_samples
        )


class Elbo(Stateful):
    """Penalty ``kl_weight * KL_i / n_i`` per task, to be added to that task's RL loss, and its controllers.

    Args:
        config: weight, normalisation, schedule, prior.
        num_tasks: number of tasks.
        budget_per_task: transitions of a task in the whole run, for ``normalization=budget``.
    """

    state_fields = ("schedule", "prior")

    def __init__(self, config: ElboConfig, num_tasks: int, budget_per_task: float = 1.0) -> None:
        self.config, self.budget_per_task = config, budget_per_task
        self.schedule: KLSchedule = config.schedule.build(config.kl_weight, num_tasks)
        self.prior: Prior = config.prior.build(config.prior_scale, num_tasks)
        self._nats: dict[int, Tensor] = {}  # of each network at its latest penalty
        self._layers: WeakKeyDictionary[nn.Module, list[TaskModule]] = WeakKeyDictionary()

    def penalty(self, module: nn.Module, held: int, seen: int | None = None) -> Tensor | float:
        """Return the weighted ``KL_i / n_i`` of ``module``, ``[T]``; 0 without weight or layers with a divergence.

        ``held`` are a task's transitions in rollout or replay, ``seen`` those so far (None: as many).
        Layers with ``paid_apart`` are not in it: somebody else adds their divergence to the loss.
        """
        if self.config.kl_weight == 0.0:
            return 0.0
        if module not in self._layers:  # the search is not free
            found = [layer for _, layer in penalized_layers(module)]
            self._layers[module] = [layer for layer in found if not layer.paid_apart]
        if not self._layers[module]:
            return 0.0
        nats = summed_kl(self._layers[module])
        self._nats[id(module)] = nats.detach()
        weight, free_nats = self._weight(nats.device), self.schedule.free_nats
        if free_nats is not None:
            nats = (nats - free_nats).clamp_min(0.0)
        return weight * nats / self._divisor(module, held, seen)

    def price(self, module: nn.Module, held: int, seen: int | None = None) -> Tensor | float:
        """Return what a nat of ``module`` costs in :meth:`penalty`: the weight over ``n_i``, a float or ``[T]``."""
        return self._weight(next(module.parameters()).device) / self._divisor(module, held, seen)

    def _weight(self, device: torch.device) -> Tensor | float:
        weight = self.schedule.weight
        return weight.to(device) if isinstance(weight, Tensor) else weight

    def _divisor(self, module: nn.Module, held: int, seen: int | None) -> float:
        """Return ``n_i``; ``seen`` None: as many as are held."""
        choice, seen = self.config.normalization, held if seen is None else seen
        if choice is KLNormalization.parameters:
            return float(max(posterior_size(module), 1))
        counts = {KLNormalization.seen: seen, KLNormalization.budget: self.budget_per_task, KLNormalization.none: 1}
        return float(max(counts.get(choice, held), 1))

    def advance(self, fraction: float) -> None:
        """Take note of the share of total_transitions that is done."""
        self.schedule.advance(fraction)

    @torch.no_grad()
    def step(self, modules: Mapping[str, nn.Module], gap: LossGap) -> None:
        """After a gradient update of ``modules``: the controllers of weight and prior move.

        ``gap`` gives, on demand, the critic loss with theta alone minus that with the residuals, ``[T]``.
        """
        if self._nats and self.schedule.reacts:
            self.schedule.step(torch.stack(list(self._nats.values())).sum(0), modules)
        if self._nats and self.prior.moves:
            self.prior.step(modules.values(), gap)

    def metrics(self, modules: Mapping[str, nn.Module]) -> Metrics:
        """Return the state of the controllers as ``elbo/<name>``."""
        values = self.schedule.metrics() | self.prior.metrics(modules.values())
        return {f"elbo/{name}": value for name, value in values.items()}


def posterior_size(module: nn.Module) -> int:
    """Return the number of Gaussian weights in one task's posterior, or of penalised ones where there is none."""
    return sum(layer.penalized_size for _, layer in penalized_layers(module))
