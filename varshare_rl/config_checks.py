"""Relations among components, checked before anything is built. Those within one are in its own config class."""

from __future__ import annotations

from varshare_rl.algorithms.ppo import PPOConfig
from varshare_rl.algorithms.sac import SACConfig
from varshare_rl.config import MatmulPrecision, TrainConfig
from varshare_rl.data.normalizers import ObservationStatistics
from varshare_rl.errors import UserError
from varshare_rl.fields import check_bounds
from varshare_rl.nn.config import Blocks
from varshare_rl.nn.critic import ValueLoss
from varshare_rl.nn.variational import Estimator
from varshare_rl.optim.elbo import Penalized
from varshare_rl.optim.gradient import TEMPERATURE
from varshare_rl.optim.kl_schedules import BandConfig, ConstantConfig, DualConfig
from varshare_rl.optim.optimizer import PosteriorOptimizer
from varshare_rl.optim.task_subset import compared


def check_config(config: TrainConfig) -> None:
    """Refuse a configuration of a run that cannot be, whether of a training run or of a sequence.

    Raises:
        UserError: names the option, its value, and what is allowed.
    """
    check_bounds(config)
    if config.overwrite and config.resume is not None:
        raise UserError(f"overwrite=true starts anew, and resume={config.resume} goes on; give one of them")
    if config.matmul_precision is MatmulPrecision.bf16 and isinstance(config.algorithm, PPOConfig):
        raise UserError(
            "matmul_precision=bf16 rounds acting and updating differently, so PPO's ratio would not start at 1; "
            "use highest with algorithm=ppo"
        )
    algorithm = config.algorithm
    if getattr(algorithm, "value_clip", None) is not None and config.critic.loss is ValueLoss.categorical:
        raise UserError(
            f"algorithm.value_clip={algorithm.value_clip} bounds a number, and critic.loss=categorical learns a "
            "distribution; give null, or critic.loss=squared"
        )
    scales = getattr(algorithm, "observation_statistics", None) is ObservationStatistics.suite
    if scales and not algorithm.normalize_observations:
        raise UserError(
            "algorithm.observation_statistics=suite is about normalised observations, and "
            "algorithm.normalize_observations=false; give true, or leave the former out"
        )
    for part in ("actor", "critic"):
        if getattr(config.gradient, part) == TEMPERATURE and not isinstance(config.algorithm, SACConfig):
            raise UserError(
                f"gradient.{part}=softmax_temperature weighs tasks by SAC's entropy coefficients, which "
                f"algorithm={config.algorithm.name} does not have; use algorithm=sac or another gradient"
            )
    capacity, envs = getattr(config.algorithm, "replay_capacity_per_task", None), config.env.envs_per_task
    if capacity is not None and capacity < envs:
        raise UserError(
            f"algorithm.replay_capacity_per_task is {capacity}; one step of env.envs_per_task={envs} must fit"
        )
    if config.overlap and envs == 1:
        raise UserError(
            "overlap=true acts for half of a task's environments while the others step, and "
            "env.envs_per_task is 1; give 2 or more, or overlap=false"
        )
    _check_blocks(config)
    _check_task_subset(config)
    _check_ivon(config)


def _check_blocks(config: TrainConfig) -> None:
    """Refuse residual blocks that cannot be, of the policy or of critics that take them over."""
    own = config.critic.architecture(config.network)
    for name, network in (("network", config.network), ("critic", own)):
        if network.blocks is Blocks.bronet and len(set(network.hidden)) != 1:
            raise UserError(
                f"{name}.blocks=bronet has residual blocks, and hidden is {list(network.hidden)}; "
                f"give {name}.hidden one size, once and then once for every block"
            )
    if own.blocks is Blocks.bronet and config.critic.layer_norm is False:
        raise UserError("critic.layer_norm=false is not possible with blocks=bronet, which is made of LayerNorms")


def _check_task_subset(config: TrainConfig) -> None:
    """Refuse what compares all tasks at every update where updates are of a few."""
    if getattr(config.algorithm, "tasks_per_update", None) is None:
        return
    for given, instead in compared(config.gradient, config.elbo, config.divergence_guard).items():
        raise UserError(
            f"{given} compares all tasks at every update, and algorithm.tasks_per_update="
            f"{config.algorithm.tasks_per_update} makes updates of a few; give {instead}, or null for the latter"
        )


def _check_ivon(config: TrainConfig) -> None:
    """Refuse what leaves IVON without the price of a nat, or without draws to see curvature by."""
    if config.optimizer.posteriors is not PosteriorOptimizer.ivon:
        return
    elbo = config.elbo
    found = {
        f"elbo.kl_weight={elbo.kl_weight:g}": (elbo.kl_weight == 0, "a positive weight"),
        f"elbo/schedule={elbo.schedule.name}": (
            not isinstance(elbo.schedule, ConstantConfig | BandConfig | DualConfig), "constant, band or dual"
        ),
        f"elbo.networks={elbo.networks.value}": (elbo.networks is not Penalized.both, "both"),
        f"elbo.estimator={getattr(elbo.estimator, 'value', None)}": (elbo.estimator is Estimator.mean, "another"),
        f"elbo.temperature={elbo.temperature:g}": (elbo.temperature != 1, "1"),
    }  # fmt: skip
    for given, (wrong, instead) in found.items():
        if wrong:
            raise UserError(
                f"optimizer.posteriors=ivon takes the width of posteriors from what nats cost and draws show, and "
                f"{given} leaves it without; give {instead}, or optimizer.posteriors=adam"
            )
