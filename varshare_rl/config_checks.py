"""What is refused of a configuration before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from operator import attrgetter
from typing import Any

from varshare_rl.algorithms.ppo import PPOConfig
from varshare_rl.algorithms.sac import SACConfig
from varshare_rl.config import MatmulPrecision, TrainConfig
from varshare_rl.errors import UserError
from varshare_rl.nn.config import Blocks
from varshare_rl.optim.aggregators import AggregatorName
from varshare_rl.optim.elbo import ElboConfig
from varshare_rl.optim.kl_schedules import ConstantConfig, DualConfig, RampConfig
from varshare_rl.optim.priors import FixedPriorConfig

#: Least and most of options that some components of a group have; None: no bound, or a null is allowed.
RANGES: dict[str, dict[str, tuple[float, float | None]]] = {
    "elbo": {"kl_weight": (0, None), "temperature": (0, None), "weight_samples": (1, None)},
    "elbo.schedule": {
        "warmup": (0, 1),
        "late": (0, 1),
        "late_factor": (0, None),
        "low": (0, None),
        "factor": (1, None),
        "interval": (1, None),
        "smoothing": (0, 1),
        "rate": (0, None),
        "gain": (0, None),
        "least": (0, None),
        "free_nats": (0, None),
    },
    "elbo.prior": {
        "rate": (0, None),
        "spring": (0, None),
        "interval": (1, None),
        "smoothing": (0, 1),
    },
    "network": {
        "rank": (1, None),
        "active_parameters": (1, None),
        "embedding": (1, None),
        "modules": (1, None),
        "parameter_sets": (1, None),
        "experts": (1, None),
        "encoder_width": (1, None),
        "context": (1, None),
    },
    "algorithm": {
        "rollout_transitions_per_task": (2, None),
        "epochs": (1, None),
        "minibatches": (1, None),
        "batch_per_task": (1, None),
        "tasks_per_update": (1, None),
        "replay_capacity_per_task": (1, None),
        "start_transitions_per_task": (1, None),
        "updates_per_transition_per_task": (0, None),
        "learning_rate": (0, None),
        "critic_learning_rate": (0, None),
        "entropy_learning_rate": (0, None),
        "initial_entropy_coefficient": (0, None),
        "entropy_weight": (0, None),
        "max_grad_norm": (0, None),
        "clip": (0, None),
        "target_kl": (0, None),
        "discount": (0, 1),
        "gae_lambda": (0, 1),
        "target_rate": (0, 1),
        "resets": (0, None),
    },
    "critic": {"bins": (2, None)},
    "optimizer": {
        "mu_lr_scale": (0, None),
        "rho_lr_scale": (0, None),
        "weight_decay": (0, None),
        "warmup": (0, 1),
        "final_rate": (0, 1),
    },
}


def check_config(config: TrainConfig) -> None:
    """Refuse impossible numbers before anything is built.

    Raises:
        UserError: names the option, its value, and what is allowed.
    """
    limits: list[tuple[str, float | None, float, float | None]] = [
        ("total_transitions", config.total_transitions, 1, None),
        ("seed", config.seed, 0, 2**32 - 1),
        ("evaluate.every", config.evaluate.every, 0, None),
        ("evaluate.episodes", config.evaluate.episodes, 1, None),
        ("checkpoint.every", config.checkpoint.every, 0, None),
        ("log.every", config.log.every, 0, None),
        ("observe.every", config.observe.every, 0, None),
        ("env.envs_per_task", config.env.envs_per_task, 1, None),
        ("env.workers", getattr(config.env, "workers", None), 0, None),
        ("elbo.absorb.every", config.elbo.absorb.every, 0, None),
        ("elbo.absorb.rate", config.elbo.absorb.rate, 0, 1),
        ("elbo.absorb.max_error", config.elbo.absorb.max_error, 0, None),
        ("divergence_guard.explosion", config.divergence_guard.explosion, 0, None),
        ("gradient.cagrad.c", config.gradient.cagrad.c, 0, None),
        ("gradient.fairgrad.alpha", config.gradient.fairgrad.alpha, 0, None),
        ("gradient.nashmtl.max_norm", config.gradient.nashmtl.max_norm, 0, None),
        ("gradient.nashmtl.solve_every", config.gradient.nashmtl.solve_every, 1, None),
        ("gradient.nashmtl.iterations", config.gradient.nashmtl.iterations, 1, None),
        ("gradient.gradvac.decay", config.gradient.gradvac.decay, 0, 1),
        ("gradient.gradnorm.asymmetry", config.gradient.gradnorm.asymmetry, 0, None),
        ("gradient.gradnorm.learning_rate", config.gradient.gradnorm.learning_rate, 0, None),
        *((f"network.hidden[{index}]", size, 1, None) for index, size in enumerate(config.network.hidden)),
        *((f"critic.hidden[{index}]", size, 1, None) for index, size in enumerate(config.critic.hidden or [])),
    ]
    for group, ranges in RANGES.items():
        options = attrgetter(group)(config)
        limits += [
            (f"{group}.{name}", getattr(options, name), *bounds)
            for name, bounds in ranges.items()
            if hasattr(options, name)
        ]
    check_limits(limits)
    _check_relations(config)
    _check_finite("", asdict(config))


def check_limits(limits: Iterable[tuple[str, float | None, float, float | None]]) -> None:
    """Refuse numbers outside their bounds: name, value (None: not given), least, and most (None: no bound).

    Raises:
        UserError: names the first of them.
    """
    for name, value, least, most in limits:
        if value is not None and not (value >= least and (most is None or value <= most)):
            allowed = f"at least {least}" if most is None else f"between {least} and {most}"
            raise UserError(f"{name} is {value}; it must be {allowed}")


def _check_finite(name: str, value: Any) -> None:
    """Refuse infinity and NaN wherever a number is asked for."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_finite(f"{name}.{key}" if name else key, entry)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _check_finite(f"{name}[{index}]", entry)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}; it must be a finite number")


def _check_relations(config: TrainConfig) -> None:
    """Refuse options that are possible alone but not together."""
    _check_elbo(config.elbo)
    if config.elbo.absorb.every and config.elbo.absorb.rate == 0:
        raise UserError("elbo.absorb.rate is 0, which moves nothing; give up to 1, or elbo.absorb.every=0")
    alpha = getattr(config.network, "alpha", None)
    if alpha is not None and not alpha > 0:
        raise UserError(f"network.alpha is {alpha:g}; it must be positive, or null for the rank")
    if alpha is not None and config.network.rank is None:
        raise UserError(
            f"network.alpha is {alpha} and scales a low-rank residual, but network.rank is null; "
            "leave one of them out"
        )
    _check_critic(config)
    _check_window(config)
    if config.matmul_precision is MatmulPrecision.bf16 and isinstance(config.algorithm, PPOConfig):
        raise UserError(
            "matmul_precision=bf16 rounds acting and updating differently, so PPO's ratio would not start at 1; "
            "use highest with algorithm=ppo"
        )
    lowest, highest = (getattr(config.algorithm, f"{end}_log_std", 0.0) for end in ("min", "max"))
    if lowest > highest:
        raise UserError(f"algorithm.min_log_std is {lowest}; it must not be above max_log_std, {highest}")
    for part in ("actor", "critic"):
        temperature = getattr(config.gradient, part) is AggregatorName.softmax_temperature
        if temperature and not isinstance(config.algorithm, SACConfig):
            raise UserError(
                f"gradient.{part}=softmax_temperature weighs tasks by SAC's entropy coefficients, which "
                f"algorithm={config.algorithm.name} does not have; use algorithm=sac or another gradient"
            )
    if not config.gradient.fairgrad.alpha > 0:
        raise UserError(f"gradient.fairgrad.alpha is {config.gradient.fairgrad.alpha}; it must be positive")
    if config.optimizer.warmup >= 1:
        raise UserError(f"optimizer.warmup is {config.optimizer.warmup}; it must be below 1, a share of the run")
    if config.divergence_guard.explosion and config.divergence_guard.explosion <= 1:
        raise UserError(
            f"divergence_guard.explosion is {config.divergence_guard.explosion}; it must be above 1, or 0 to switch it off"
        )
    capacity, envs = getattr(config.algorithm, "replay_capacity_per_task", None), config.env.envs_per_task
    if capacity is not None and capacity < envs:
        raise UserError(
            f"algorithm.replay_capacity_per_task is {capacity}; one step of env.envs_per_task={envs} must fit"
        )


def _check_elbo(elbo: ElboConfig) -> None:
    for part in ("schedule", "prior"):
        given = getattr(elbo, part)
        if not is_dataclass(given):
            raise UserError(f"elbo.{part} is {given}; choose one with a slash: elbo/{part}={given}")
    if not elbo.prior_scale > 0:
        raise UserError(f"elbo.prior_scale is {elbo.prior_scale}; it must be positive")
    schedule, prior = elbo.schedule, elbo.prior
    if elbo.kl_weight == 0 and not isinstance(schedule, ConstantConfig):
        raise UserError(
            f"elbo.kl_weight is 0, from which elbo/schedule={schedule.name} cannot start; give a positive weight"
        )
    positive = [("schedule", schedule, "budget_nats"), ("schedule", schedule, "least"), ("prior", prior, "least")]
    for part, options, name in positive:
        if not getattr(options, name, 1.0) > 0:
            raise UserError(f"elbo.{part}.{name} is {getattr(options, name)}; it must be positive")
    pairs = [
        ("schedule", schedule, "low", "high"),
        ("schedule", schedule, "least", "most"),
        ("prior", prior, "least", "most"),
    ]
    for part, options, low, high in pairs:
        if hasattr(options, low) and not getattr(options, low) < getattr(options, high):
            raise UserError(
                f"elbo.{part}.{low} is {getattr(options, low)}; it must be below {high}, {getattr(options, high)}"
            )
    if isinstance(schedule, RampConfig) and schedule.warmup + schedule.late > 1:
        raise UserError(f"elbo.schedule.warmup + late is {schedule.warmup + schedule.late:g}; it must be at most 1")


def _check_critic(config: TrainConfig) -> None:
    """Refuse critics, and blocks of any network, that cannot be."""
    critic = config.critic
    if not -math.inf < critic.value_min < critic.value_max < math.inf:
        raise UserError(
            f"critic.value_min is {critic.value_min} and value_max {critic.value_max}; "
            "both must be finite, the first below the second"
        )
    if not 0 < critic.popart_rate <= 1:
        raise UserError(f"critic.popart_rate is {critic.popart_rate}; it must be above 0 and at most 1")
    own = critic.architecture(config.network)
    for name, network in (("network", config.network), ("critic", own)):
        if network.blocks is Blocks.bronet and len(set(network.hidden)) != 1:
            raise UserError(
                f"{name}.blocks=bronet has residual blocks, and hidden is {list(network.hidden)}; "
                f"give {name}.hidden one size, once and then once for every block"
            )
    if own.blocks is Blocks.bronet and critic.layer_norm is False:
        raise UserError("critic.layer_norm=false is not possible with blocks=bronet, which is made of LayerNorms")


def _check_window(config: TrainConfig) -> None:
    """Refuse what compares all tasks at every update where updates are of a few."""
    if getattr(config.algorithm, "tasks_per_update", None) is None:
        return
    clashes = [
        (f"gradient.{part}={method.value}", "gradient=mean")
        for part, method in (("actor", config.gradient.actor), ("critic", config.gradient.critic))
        if method is not AggregatorName.mean
    ]
    if isinstance(config.elbo.schedule, DualConfig):
        clashes.append(("elbo/schedule=dual", "another schedule"))
    if not isinstance(config.elbo.prior, FixedPriorConfig):
        clashes.append((f"elbo/prior={config.elbo.prior.name}", "elbo/prior=fixed"))
    if config.divergence_guard.explosion:
        clashes.append(
            (f"divergence_guard.explosion={config.divergence_guard.explosion:g}", "divergence_guard.explosion=0")
        )
    for given, instead in clashes:
        raise UserError(
            f"{given} compares all tasks at every update, and algorithm.tasks_per_update="
            f"{config.algorithm.tasks_per_update} makes updates of a few; give {instead}, or null for the latter"
        )
