"""The optimiser behind a step: roles of the parameters, their learning rates, and how rates change in a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.optim.ivon import IvonConfig


class Schedule(Enum):
    """Ways for learning rates and weights to fall with the share of ``total_transitions`` that is done."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"

    def factor(self, done: float, end: float) -> float:
        """Return 1 at ``done = 0`` and, unless constant, ``end`` at ``done = 1``.

        With ``p = done`` and ``e = end`` it is 1 (constant), ``1 - (1 - e) p`` (linear), or
        ``e + (1 - e) (1 + cos(pi p)) / 2`` (cosine; Loshchilov and Hutter 2017, without restarts).
        """
        if self is Schedule.linear:
            return 1.0 - (1.0 - end) * done
        if self is Schedule.cosine:
            return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0


class OwnGradients(Enum):
    """Sizes of the gradients of what one task owns."""

    averaged = "averaged"
    apart = "apart"


class PosteriorOptimizer(Enum):
    """Optimisers of the tasks' posteriors; everything else has Adam."""

    adam = "adam"
    ivon = "ivon"


@dataclass
class OptimizerConfig:
    """Options of ``optimizer``, for actor and critic. Rates are factors on their learning rates."""

    posteriors: PosteriorOptimizer = PosteriorOptimizer.adam
    """Optimiser of the tasks' posteriors: `adam`, on mu and rho; or `ivon`, a variational Newton method, whose step
    and width follow the loss's curvature (`optimizer.ivon`)."""
    ivon: IvonConfig = field(default_factory=IvonConfig)
    "Options of IVON."
    mu_lr_scale: float = bounded(1.0, least=0)
    "Factor on the learning rate for the means of the tasks' posteriors."
    rho_lr_scale: float = bounded(30.0, least=0)
    """Factor on the learning rate for the standard deviations of the tasks' posteriors. Their gradients are mostly
    noise around a small pull, and they are on a logarithmic scale."""
    b_lr_ratio: float = bounded(1.0, above=0)
    "Rate of the factors `B` of residuals, or of their means, over that of `A`: LoRA+ above 1."
    weight_decay: float = bounded(0.0, least=0)
    "Decoupled weight decay (AdamW) on shared weights; not on biases and norms."
    schedule: Schedule = Schedule.constant
    "Fall of the learning rates in the course of the budget, once warm."
    warmup: float = bounded(0.0, least=0, below=1)
    "Share of the budget in which learning rates rise from 0."
    decay_start: float = bounded(0.0, least=0, below=1)
    "Share of the budget after which learning rates fall, if that is not before the end of `warmup`."
    final_rate: float = bounded(0.0, least=0, most=1)
    "End of `linear` and `cosine`, as a share of the learning rate."
    epsilon: float | None = bounded(None, above=0)
    "Adam's epsilon of what the tasks share and of heads; null: the algorithm's own."
    adapter_epsilon: float | None = bounded(1e-15, above=0)
    """Adam's epsilon of adapters; null: as of the rest. Gradients of their rhos are as small as `kl_weight / n_i`,
    which an epsilon of 1e-5, PPO's of the rest, swallows."""
    own_gradients: OwnGradients = OwnGradients.apart
    """Gradients of a task's own parameters: those of its own loss, clipped apart task by task (`apart`); or divided
    by the number of tasks and clipped with the shared ones (`averaged`), unless nothing is shared."""

    def check(self, prefix: str) -> None:
        """Raise UserError for options of the optimiser or the schedule that is not chosen."""
        for name in ("decay_start", "final_rate") if self.schedule is Schedule.constant else ():
            if getattr(self, name):
                raise UserError(
                    f"{prefix}{name} is {getattr(self, name):g} and counts with {prefix}schedule=linear or cosine "
                    "alone, and it is constant; set the one or leave out the other"
                )
        usual, other = OptimizerConfig(), "ivon"
        names = ["ivon"]
        if self.posteriors is PosteriorOptimizer.ivon:
            other, names = "adam", ["mu_lr_scale", "rho_lr_scale", "b_lr_ratio", "adapter_epsilon"]
        for name in names:
            if getattr(self, name) != getattr(usual, name):
                raise UserError(
                    f"{prefix}{name} counts with {prefix}posteriors={other} alone, and it is "
                    f"{self.posteriors.value}; leave the former out"
                )


def schedule_factor(config: OptimizerConfig, fraction: float) -> float:
    """Return the factor on every learning rate when ``fraction`` of the run is done.

    It rises linearly to 1 until ``fraction = warmup``, stays there until ``fraction = decay_start``, and falls from
    there as :meth:`Schedule.factor` says. With all three it is a trapezoid (Zhai et al. 2022; Hägele et al. 2024).
    """
    fraction = min(max(fraction, 0.0), 1.0)
    if fraction < config.warmup:
        return fraction / config.warmup
    start = max(config.warmup, config.decay_start)
    return config.schedule.factor(max(fraction - start, 0.0) / (1.0 - start), config.final_rate)


class ScheduledAdam:
    """Fused Adam (Kingma and Ba 2015) in groups by rate and decay, and its rates in the course of a run.

    Decay is decoupled (AdamW; Loshchilov and Hutter 2019): ``theta -= learning_rate * weight_decay * theta``.

    Args:
        trained: the parameters with their roles.
        learning_rate: before factors.
        epsilon: Adam's, unless ``config`` has one.
        config: see :class:`OptimizerConfig`.
    """

    def __init__(
        self, trained: Sequence[Role], learning_rate: float, epsilon: float, config: OptimizerConfig
    ) -> None:
        self.config = config
        rates = {Kind.mu: config.mu_lr_scale, Kind.rho: config.rho_lr_scale}
        epsilon = epsilon if config.epsilon is None else config.epsilon
        epsilons = dict.fromkeys(rates, epsilon if config.adapter_epsilon is None else config.adapter_epsilon)
        groups: dict[tuple[float, float, float], list[torch.nn.Parameter]] = {}
        for role in trained:
            decay = config.weight_decay if role.decays else 0.0
            rate = learning_rate * rates.get(role.kind, 1.0) * (config.b_lr_ratio if role.is_b else 1.0)
            key = (rate, decay, epsilons.get(role.kind, epsilon))
            groups.setdefault(key, []).append(role.parameter)
        self.rates = [rate for rate, _, _ in groups]
        described: list[dict[str, Any]] = [
            {"params": parameters, "lr": rate, "weight_decay": decay, "eps": eps}
            for (rate, decay, eps), parameters in groups.items()
        ]
        self.roles, self.factor = trained, 1.0
        self.current_factor = 1.0  # with that of the schedule, since the last advance
        kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
        self.adam = kind(described, lr=learning_rate, fused=True)
        self.adam.register_load_state_dict_post_hook(_expand_moments)

    def advance(self, fraction: float) -> None:
        """Set the rates for when ``fraction`` of the run is done."""
        self.current_factor = self.factor * schedule_factor(self.config, fraction)
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.current_factor

    def mean_steps(self) -> dict[str, float]:
        """Return the mean over entries of ``|last step| / learning rate`` by role, from Adam's moments.

        ``|m| / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + epsilon)``: near 1 while gradients keep their sign, a
        tenth or so under noise, near 0 for a role whose gradients drown in epsilon.
        """
        groups = {id(parameter): group for group in self.adam.param_groups for parameter in group["params"]}
        sums: dict[str, tuple[float, int]] = {}
        for role in self.roles:
            state, group = self.adam.state.get(role.parameter), groups[id(role.parameter)]
            if not state:
                continue
            time, (beta_1, beta_2) = float(state["step"]), group["betas"]
            second = (state["exp_avg_sq"] / (1.0 - beta_2**time)).sqrt() + group["eps"]
            size = float((state["exp_avg"].abs() / second).sum()) / (1.0 - beta_1**time)
            total, count = sums.get(role.kind.value, (0.0, 0))
            sums[role.kind.value] = (total + size, count + role.parameter.numel())
        return {name: total / count for name, (total, count) in sums.items()}


def _expand_moments(adam: torch.optim.Optimizer) -> None:
    """Give every task the moments of what the tasks shared when the checkpoint was written."""
    for parameter, state in adam.state.items():
        for name, moment in state.items():
            if moment.dim() == parameter.dim() - 1 > 0:
                state[name] = moment.expand_as(parameter).contiguous()


class Kind(Enum):
    """The kinds of parameters that have a learning rate of their own."""

    theta = "theta"  # shared by the tasks
    heads = "heads"  # of one task in a layer that shares nothing
    mu = "mu"  # of an adapter: parameters of one task that correct weights which the tasks share
    rho = "rho"  # of an adapter


@dataclass(frozen=True)
class Role:
    """One parameter; ``own``: dim 0 is the task; ``decays``: it is a weight that weight decay may act on.

    ``is_b``: it is the factor ``B`` of low-rank residuals, or its mean (LoRA+; Hayou et al. 2024).
    """

    parameter: nn.Parameter
    own: bool
    kind: Kind
    decays: bool
    is_b: bool = False


def roles(trained: nn.Module | Iterable[nn.Parameter]) -> list[Role]:
    """Return the roles of all parameters that require a gradient, in the module's order.

    Layers name stacked parameters (dim 0 is the task) in ``per_task_parameters``, and the rhos among them in
    ``rho_parameters``. Stacked ones are an adapter's where the layer has others too, and all parameters of a module
    that says ``is_adapter`` are, as the weights that it corrects are another's. Weights are the shared parameters
    of two dimensions or more, and of three or more where dim 0 is the task (of layers that share nothing) or, as a
    layer says by ``stacks_copies``, a copy of a layer; parameters outside a module count as shared and do not
    decay.
    """
    if not isinstance(trained, nn.Module):
        return [Role(parameter, False, Kind.theta, False) for parameter in trained]
    found: dict[int, Role] = {}
    for layer in trained.modules():
        stacked = set(getattr(layer, "per_task_parameters", ()))
        sigmas = set(getattr(layer, "rho_parameters", ()))
        copies = getattr(layer, "stacks_copies", False)
        parameters = dict(layer.named_parameters(recurse=False))
        corrects = getattr(layer, "is_adapter", False)
        adapter = corrects or any(name not in stacked for name in parameters)
        for name, parameter in parameters.items():
            own = name in stacked
            kind = Kind.rho if name in sigmas else Kind.mu if adapter else Kind.heads
            kind = kind if own or corrects else Kind.theta
            decays = kind in (Kind.theta, Kind.heads) and parameter.dim() >= (3 if own or copies else 2)
            is_b = name in getattr(layer, "b_parameters", ())
            found.setdefault(id(parameter), Role(parameter, own, kind, decays, is_b))
    return [found[id(parameter)] for parameter in trained.parameters() if parameter.requires_grad]
