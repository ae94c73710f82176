"""Train one agent on many tasks.

    python -m varshare_rl.train env=mt10 algorithm=sac total_transitions=2000000

    env=mt10                   pointmass, cartpole, lunarlander, gymnasium, metaworld, mt1, mt3, mt25, mt50
    algorithm=ppo              or sac
    network=varshare_lora      and others; a wrong name lists them, as everywhere
    gradient=mean              how losses per task become one gradient: pcgrad, cagrad, fairgrad, ...
    total_transitions=20000000 the budget, all tasks together; its default is the environment's
    seed=0                     of everything random
    device=auto                or cpu, cuda
    elbo.kl_weight=0.1         how dear it is for a task to differ from the others; 1 is the plain ELBO
    elbo.prior_scale=0.03      size of a task's own part before it costs anything, relative to the shared one
    network.hidden=[256,256]   sizes of the hidden layers; its default is the environment's
    env.envs_per_task=10       environments of every task; its default is the environment's
    run_dir=null               the run folder; null: runs/<what it is>_<time>
    from=null                  a run folder whose last checkpoint a new run begins with, with other rates or weights
    resume=null                a run folder to go on with; auto: the one of this name, if it holds a run
    overwrite=false            true: start anew in a folder that holds a run
    +experiment=<name>         published settings in one word, such as toppo_mt10
    -m seed=0,1                a sweep: a run for every value, or for every combination of several; the same command
                               again goes on (docs/sweeps.md)

All keys: docs/configuration.md; --cfg job shows them with their values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from omegaconf import OmegaConf

from varshare_rl.assemble import build_algorithm, build_suite, choose_device
from varshare_rl.command_line import whole_numbers
from varshare_rl.commands.attempts import built, train
from varshare_rl.config import (
    AUTO,
    RESUMABLE,
    TrainConfig,
    check_same,
    check_unchanged,
    load_config,
)
from varshare_rl.config_checks import check_config
from varshare_rl.envs.object_env import Maker
from varshare_rl.envs.objects import ObjectsConfig
from varshare_rl.errors import UserError
from varshare_rl.ranks import ALONE, Ranks
from varshare_rl.reading import read_object, reading
from varshare_rl.run.callbacks import Callbacks
from varshare_rl.run.checkpoint import fitting, newest_checkpoint
from varshare_rl.run.console import counted
from varshare_rl.run.folder import held_folder, name_folder, new_folder
from varshare_rl.run.process import joined_ranks
from varshare_rl.run_files import CONFIG_FILE, SUMMARY_FILE
from varshare_rl.sweeps.command import RunCommand, say_done
from varshare_rl.sweeps.sweep import run_training
from varshare_rl.types import Tree


def run_config(
    config: TrainConfig,
    overrides: Sequence[str] = (),
    makers: Mapping[str, Maker] | None = None,
    callbacks: Callbacks | None = None,
) -> Path:
    """Train a new agent, or go on with ``config.resume``, and return the run folder.

    Args:
        config: of the run; one that goes on takes its own from its folder.
        overrides: that ``config`` was composed of; one that goes on changes what they say.
        makers: of the environments where they are objects, by task.
        callbacks: functions to call meanwhile.

    Raises:
        UserError: whatever the user got wrong.
        Interrupted: a signal came; all is saved, and the screen says how to go on.
    """
    if config.resume is not None and config.resume != AUTO:
        if config.pretrained is not None:
            raise UserError(
                f"from={config.pretrained} begins a new run, and resume={config.resume} goes on with one; "
                "give one of them"
            )
        run_dir = Path(config.resume)
        if not run_dir.is_dir():
            raise UserError(f"no run folder {run_dir} to resume; give the folder of a run (runs/<name>)")
        ranks = joined_ranks()
        with ranks.entered(held_folder(run_dir)):
            resume(run_dir, overrides, makers, callbacks, ranks)
        return run_dir
    check_config(config)
    if config.resume is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UserError("torchrun --max-restarts starts the same command again; give run_dir=<folder> resume=auto")
    auto, overwrite = config.resume is not None, config.overwrite
    config = replace(config, resume=None, overwrite=False)  # which are not the run's
    suite = build_suite(config, makers)
    parts = (suite.name, config.algorithm.name, config.network.name, f"s{config.seed}")
    ranks = joined_ranks()
    wanted = ranks.from_first(lambda: name_folder(config.run_dir, parts, dated=not auto))
    if auto and ranks.from_first((wanted / CONFIG_FILE).exists):
        with ranks.entered(held_folder(wanted)):
            if not ranks.from_first(lambda: is_done(wanted, as_built(config, makers))):
                go_on(wanted, config, makers, callbacks, ranks)
            elif ranks.first:
                say_done(wanted, config, config_of(wanted))
        return wanted
    if overwrite:
        as_built(config, makers)  # before anything is lost
    state = None
    if config.pretrained is not None:
        if wanted.absolute() == Path(config.pretrained).absolute():
            raise UserError(f"run_dir={wanted} is the run that this one begins with; give another folder")
        require_makers(config, makers, f"'from={config.pretrained}'")
        state = state_of_branch(config, ranks)
    with ranks.entered(new_folder(wanted, config.run_dir is None and not auto, overwrite)) as run_dir:
        train(config, built(config, suite, run_dir, state, ranks), state, callbacks, new=True)
    return run_dir


def state_of_branch(config: TrainConfig, ranks: Ranks) -> Tree:
    """Return the last checkpoint of the run that this one begins with.

    Raises:
        UserError: there is none, or it has done all transitions of this run already.
    """
    state = training_state(Path(str(config.pretrained)), ranks)
    if state["transitions"] >= config.total_transitions:
        raise UserError(
            f"from={config.pretrained} has done {state['transitions']} transitions already; give "
            "total_transitions=<more>, which counts them"
        )
    return state


def as_built(config: TrainConfig, makers: Mapping[str, Maker] | None = None) -> TrainConfig:
    """Check a configuration as a start would, by building its networks, and return what ``config.yaml`` would have.

    Raises:
        UserError: whatever the user got wrong.
    """
    check_config(config)
    choose_device(config.device)
    build_algorithm(config, build_suite(config, makers), torch.device("cpu"))
    return config


def config_of(run_dir: Path) -> TrainConfig:
    """Read the configuration of the run in a folder."""
    return load_config(run_dir / CONFIG_FILE)


def is_done(run_dir: Path, config: TrainConfig) -> bool:
    """Return True if the run in a folder is that of ``config``, as built, and has come to its end.

    Raises:
        UserError: it is another.
    """
    check_same(run_dir, config, config_of(run_dir))
    path = run_dir / SUMMARY_FILE
    if not path.exists():
        return False
    with reading(path, "it is damaged; remove it"):
        return bool(read_object(path)["transitions"] >= config.total_transitions)


def resume(
    run_dir: Path,
    overrides: Sequence[str],
    makers: Mapping[str, Maker] | None = None,
    callbacks: Callbacks | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Go on with the run in ``run_dir``; ``overrides`` may change what :data:`RESUMABLE` names."""
    overrides = [item for item in overrides if not item.startswith(("resume=", "plugins="))]
    refused = [item for item in overrides if not item.startswith(RESUMABLE)]
    if refused:
        allowed = ", ".join(name.rstrip(".") for name in RESUMABLE)
        raise UserError(f"{refused[0]} cannot be changed when a run is resumed; only {allowed} can")
    stored = OmegaConf.structured(config_of(run_dir))
    merged = OmegaConf.merge(stored, OmegaConf.from_dotlist([whole_numbers(item) for item in overrides]))
    config = cast(TrainConfig, OmegaConf.to_object(merged))
    check_config(config)
    if ranks.from_first(lambda: is_done(run_dir, config)):
        raise UserError(
            f"{run_dir} has done its {config.total_transitions} transitions already; give more total_transitions"
        )
    go_on(run_dir, config, makers, callbacks, ranks)


def go_on(
    run_dir: Path,
    config: TrainConfig,
    makers: Mapping[str, Maker] | None = None,
    callbacks: Callbacks | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Train from the last checkpoint in ``run_dir`` to the end of ``config``."""
    require_makers(config, makers, f"resume={str(run_dir)!r}")
    state = training_state(run_dir, ranks)
    with fitting(run_dir):
        check_unchanged(run_dir, config, state)
    suite = build_suite(config, makers)
    train(config, built(config, suite, run_dir, state, ranks), state, callbacks)


def require_makers(config: TrainConfig, makers: Mapping[str, Maker] | None, given: str) -> None:
    """Raise UserError where environments are Python objects, and what makes them is missing beside ``given``."""
    if makers is None and config.env.name == ObjectsConfig.name:
        raise UserError(
            f"environments are Python objects there; give them: vs.train({given}, envs={{task: make, ...}})"
        )


def training_state(run_dir: Path, ranks: Ranks) -> Tree:
    """Return the last checkpoint of a run.

    Raises:
        UserError: there is none, or one of another number of ranks, or a policy alone.
    """
    _, state = newest_checkpoint(run_dir, ranks=ranks)
    if state.get("ranks", 1) != ranks.size:
        raise UserError(
            f"{run_dir} was trained by {counted(state.get('ranks', 1), 'rank')} and not {ranks.size}; start as "
            "many: torchrun --nproc-per-node <ranks> -m varshare_rl.train ..."
        )
    if "engine" not in state:
        raise UserError(f"{run_dir} holds a policy without its training state; resume the run it was made from")
    return state


COMMAND = RunCommand("train", run_config, as_built, config_of, is_done)


def command() -> None:
    """Run the command line."""
    run_training(COMMAND)
