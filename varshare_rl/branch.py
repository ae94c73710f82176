"""Options of a run that begins where another one stands: ``train from=runs/<folder> elbo.temperature=0``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from varshare_rl.config import CHANGEABLE, GROUPS, load_config
from varshare_rl.errors import UserError
from varshare_rl.run_files import CONFIG_FILE

#: Options that such a run has from the other one, as the checkpoint is made of them.
INHERITED = (
    "env.", "network.", "critic.", "seed", "elbo.prior", "elbo.start", "elbo.draw.", "optimizer.posteriors",
    "optimizer.mu_lr_scale", "optimizer.rho_lr_scale", "optimizer.b_lr_ratio", "optimizer.weight_decay",
    "optimizer.epsilon", "optimizer.adapter_epsilon", "algorithm.normalize", "algorithm.observation",
    "algorithm.min_observation", "algorithm.reward_scale", "algorithm.policy", "algorithm.log_std",
    "algorithm.initial_log_std", "algorithm.replay_capacity_per_task",
)  # fmt: skip
#: Options among those that may be given anew all the same.
NOT_INHERITED = ("env.training_horizon",)


def compose_branch(source: str, overrides: Sequence[Override]) -> DictConfig:
    """Compose the options of a run that begins with the last checkpoint of ``source``: its own, and those given.

    Raises:
        UserError: there is no such run, or an option is one that the checkpoint is made of.
        OmegaConfBaseException: there is no such option, or its value is of another kind.
    """
    if not Path(source).is_dir():
        raise UserError(f"no run folder {source}, which from= begins with; give the folder of a run (runs/<name>)")
    stored = load_config(Path(source) / CONFIG_FILE)
    stored = replace(stored, pretrained=source, run_dir=None, resume=None, overwrite=False)
    composed: DictConfig = OmegaConf.structured(stored)
    for override in overrides:
        key = override.key_or_group
        if override.is_sweep_override():
            raise UserError(f"{override.input_line} gives several values; -m makes a run of each")
        changeable = key.startswith(CHANGEABLE) or key in NOT_INHERITED
        if key in GROUPS or (key.startswith(INHERITED) and not changeable):
            raise UserError(
                f"{override.input_line} cannot be given with from={source}, whose checkpoint is made of another "
                "choice; leave that out, or start a new run (rates, schedules, clipping and weights may be given)"
            )
        if key == "elbo.kl_weight" and stored.elbo.schedule.build(1.0, 1).reacts:
            raise UserError(
                f"{override.input_line} cannot be given with from={source}, whose elbo/schedule="
                f"{stored.elbo.schedule.name} has moved the weight; give options of elbo.schedule, or leave it out"
            )
        OmegaConf.update(composed, key, override.value(), merge=False)
    return composed


def source_of(overrides: Sequence[Override]) -> str | None:
    """Return the run folder that a training run is to begin with, if any."""
    given = next((item for item in overrides if item.key_or_group == "pretrained"), None)
    return None if given is None or given.value() is None else str(given.value())
