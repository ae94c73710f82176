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
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from varshare_rl.assemble import build_algorithm, build_run, build_suite, choose_device, parameter_count
from varshare_rl.command_line import whole_numbers
from varshare_rl.config import (
    AUTO,
    RESUMABLE,
    TrainConfig,
    check_same,
    check_unchanged,
    compared_options,
    fixed_options,
    load_config,
)
from varshare_rl.config_checks import check_config
from varshare_rl.envs.object_env import Maker
from varshare_rl.envs.objects import ObjectsConfig
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import EpisodePlace, RunFailure, Terminated, UserError
from varshare_rl.files import DiskFull, write_atomically, write_json
from varshare_rl.nn.layer import penalized_layers
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.overrides import override
from varshare_rl.ranks import ALONE, LostRank, Ranks
from varshare_rl.reading import read_object, reading
from varshare_rl.run.callbacks import Callbacks
from varshare_rl.run.checkpoint import CheckpointError, fitting, newest_checkpoint
from varshare_rl.run.console import Console, counted
from varshare_rl.run.evaluation import Evaluation
from varshare_rl.run.folder import CONFIG_FILE, SUMMARY_FILE, held_folder, name_folder, new_folder
from varshare_rl.run.loop import Diverged, Run
from varshare_rl.run.loop_config import OnDivergence
from varshare_rl.run.process import joined_ranks
from varshare_rl.run.results import summary
from varshare_rl.run.signals import Interrupted
from varshare_rl.sweeps.command import RunCommand
from varshare_rl.sweeps.sweep import run_training
from varshare_rl.types import Tree

#: Failures in a row, without having come further, after which a run is given up.
MOST_FAILURES = 2
#: Episodes of a task that a run leaves out because they fail: so many, or of a hundred that it has had so many.
MOST_LEFT_OUT, MOST_OF_A_HUNDRED = 5, 1
FAILURE_FILE = "failure.txt"


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
                Console(config.total_transitions).message(f"done already: {wanted / 'summary.json'}")
        return wanted
    if overwrite:
        as_built(config, makers)  # before anything is lost
    state = None if config.pretrained is None else state_of_branch(config, ranks)
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


def built(config: TrainConfig, suite: Suite, run_dir: Path, state: Tree | None, ranks: Ranks) -> Run:
    """Build a run that is new, or goes on from ``state``; what fails on one of the ranks fails on all."""
    at, seconds = (None, 0.0) if state is None else (state["transitions"], state["seconds"])
    return ranks.together(lambda: build_run(config, suite, run_dir, at, seconds, ranks=ranks))


def as_built(config: TrainConfig, makers: Mapping[str, Maker] | None = None) -> TrainConfig:
    """Check a configuration as a start would, by building its networks, and return what ``config.yaml`` would have.

    Raises:
        UserError: whatever the user got wrong.
    """
    check_config(config)
    choose_device(config.device)
    build_algorithm(config, build_suite(config, makers), torch.device("cpu"))
    return config


def is_done(run_dir: Path, config: TrainConfig) -> bool:
    """Return True if the run in a folder is that of ``config``, as built, and has come to its end.

    Raises:
        UserError: it is another.
    """
    check_same(run_dir, config, load_config(run_dir / CONFIG_FILE))
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
    stored = OmegaConf.structured(load_config(run_dir / CONFIG_FILE))
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
    if makers is None and config.env.name == ObjectsConfig.name:
        raise UserError(
            f"the environments of {run_dir} are Python objects; give them: "
            f"vs.train(resume={str(run_dir)!r}, envs={{task: make, ...}})"
        )
    state = training_state(run_dir, ranks)
    with fitting(run_dir):
        check_unchanged(run_dir, config, state)
    suite = build_suite(config, makers)
    train(config, built(config, suite, run_dir, state, ranks), state, callbacks)


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


def train(
    config: TrainConfig, run: Run, state: Tree | None, callbacks: Callbacks | None = None, new: bool = False
) -> None:
    """Run the loop to its end and write the results, from the last checkpoint where a run fails that may go on.

    It goes on to the same numbers; where an environment fails again there, without the episode in which it does.
    A ``new`` run begins, if there is a ``state``, with that of another one.

    Raises:
        RunFailure: it has failed too often without having come further, or may not go on by itself.
        Interrupted: a signal came; all is saved, and the screen says how to go on.
    """
    failures, halvings, furthest, left_out = 0, 0, -1, list[EpisodePlace]()
    while True:
        run.callbacks = callbacks or run.callbacks
        before = None if state is None else state["transitions"]
        try:
            return attempt(config, run, state, 0.5**halvings, left_out, new)
        except RunFailure as failure:
            if isinstance(failure, LostRank | DiskFull):
                raise type(failure)(f"{failure}; go on from the last checkpoint with {going_on(run)}") from failure
            diverged = isinstance(failure, Diverged)
            failures = failures + 1 if run.transitions <= furthest else 1
            furthest = max(furthest, run.transitions)
            may_go_on = not diverged or config.on_divergence is OnDivergence.rollback
            fails = failing_episode(failure, left_out, config.env.envs_per_task) if failures > 1 else None
            given_up = failures > MOST_FAILURES and fails is None
            if given_up or not may_go_on or not (run.run_dir / CONFIG_FILE).exists():
                if run.ranks.first:
                    report_failure(run, failure)
                raise
            _, state = newest_checkpoint(run.run_dir, ranks=run.ranks)
            new = False
            halvings = diverged * (1 + halvings * (state["transitions"] == before))
            how = f" with {0.5**halvings:g} of the learning rate" if halvings else ""
            if fails is not None:
                left_out.append(fails)
                how += " without that episode"
            run.console.message(
                f"warning: {failure}; going on from the checkpoint at {state['transitions']:,} transitions{how}"
            )
            run = built(config, run.suite, run.run_dir, state, run.ranks)


def failing_episode(
    failure: RunFailure, left_out: Sequence[EpisodePlace], envs_per_task: int
) -> EpisodePlace | None:
    """Return the episode that failed; None where it is unknown, or too many of its task are left out already."""
    if failure.episode is None:
        return None
    task, _, number = failure.episode
    had = number * envs_per_task  # episodes of the task, about
    most = max(MOST_LEFT_OUT, MOST_OF_A_HUNDRED * had // 100)
    return failure.episode if sum(other[0] == task for other in left_out) < most else None


def report_failure(run: Run, failure: RunFailure) -> None:
    """Keep the traceback, and say how to go on."""
    if not (run.run_dir / CONFIG_FILE).exists():
        return
    path = run.run_dir / FAILURE_FILE
    write_atomically(path, "".join(traceback.format_exception(failure)) + failure.details)
    run.console.message(f"the traceback is in {path}; go on from the last checkpoint with:\n    {going_on(run)}")


def going_on(run: Run) -> str:
    """Return the command that goes on with a run."""
    return f"{run.ranks.launcher} -m varshare_rl.train {override('resume', run.run_dir)}"


def attempt(
    config: TrainConfig,
    run: Run,
    state: Tree | None,
    rate_factor: float,
    left_out: Sequence[EpisodePlace],
    new: bool,
) -> None:
    """Run the loop and write the results; on a signal, say how to go on and pass it on."""
    begun = not new
    try:
        describe(config, run)
        if state is None:
            run.start()
        elif new:
            begin_branch(config, run, state)
        else:
            run.load_state(state, left_out)
            run.algorithm.slow_down(rate_factor)
        if run.ranks.first:
            (run.run_dir / SUMMARY_FILE).unlink(missing_ok=True)  # of a smaller budget
            write_atomically(run.run_dir / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.structured(config)))
        begun = True
        run.tracker.begin(comparing_options(config, run), comparing_metrics(run))
        evaluation = run.train()
        if run.ranks.first:
            write_summary(config, run, evaluation)
        run.tracker.end()
        run.console.message(f"done: {run.run_dir / 'summary.json'}")
    except (Interrupted, KeyboardInterrupt, Terminated) as stop:
        if begun:
            what = f"stopped by {stop} at {run.transitions:,} transitions, all saved; go on with:"
            if not isinstance(stop, Interrupted):  # a second signal, or none that the loop could see
                what = "stopped at once; go on from the last checkpoint with:"
            run.console.message(f"{what}\n    {going_on(run)}")
        raise
    finally:
        run.close()


def begin_branch(config: TrainConfig, run: Run, state: Tree) -> None:
    """Begin a run with a checkpoint of another.

    Raises:
        UserError: the checkpoint does not go with options that were given anew.
    """
    try:
        run.branch(state)
    except CheckpointError as error:
        before, now = state.get("options", {}), fixed_options(config)
        given = [name for name in now if name != "pretrained" and before.get(name, now[name]) != now[name]]
        raise UserError(
            f"{', '.join(f'{name}={now[name]}' for name in given)} cannot be given with from={config.pretrained}, "
            "whose checkpoint is made of another choice; leave that out, or start a new run"
        ) from error


def write_summary(config: TrainConfig, run: Run, evaluation: Evaluation) -> dict[str, Any]:
    """Write ``summary.json`` and return what is in it."""
    result = summary(
        tasks=evaluation.tasks,
        transitions=run.transitions,
        updates=run.algorithm.updates,
        seconds=run.tracker.seconds,
        parameters=parameter_count(run.algorithm, len(run.suite.task_names)).as_dict(),
        provenance=run.provenance,
    )
    write_json(run.run_dir / SUMMARY_FILE, result)
    return result


def describe(config: TrainConfig, run: Run) -> None:
    """Show what is about to be trained."""
    tasks = run.suite.task_names
    count = parameter_count(run.algorithm, len(tasks))
    shown = ", ".join(tasks[:10]) + (", ..." if len(tasks) > 10 else "")
    run.console.describe(
        f"{run.suite.name} · {config.algorithm.name} · {config.network.name}",
        {
            "run folder": str(run.run_dir),
            "tasks": f"{len(tasks)} ({shown}), {counted(config.env.envs_per_task, 'environment')} each",
            "parameters": f"{count.stored:,} stored, {count.active_per_task:,} active per task, "
            f"{count.shared:,} shared, {count.per_task:,} per task",
            "memory": ", ".join(
                f"{name} {size / 1e6:.1f} MB" for name, size in run.algorithm.memory_bytes().items()
            ),
            **describe_posterior(config, run),
            **run.algorithm.description(),
            "gradient": f"actor {config.gradient.actor}, critic {config.gradient.critic}",
            "device": str(run.device),
            **({"ranks": f"{run.ranks.size}, which divide environments and batches"} if run.ranks.size > 1 else {}),
            "transitions": f"{config.total_transitions:,} in total",
            "time": "left is told after the first updates; Ctrl-C saves, and resume goes on",
        },
    )


def describe_posterior(config: TrainConfig, run: Run) -> dict[str, str]:
    """Describe the divergence and the draws of the networks, as far as they have any."""
    modules, found = run.algorithm.trained_modules().values(), {}
    if is_penalized(run):
        found["kl_weight"] = (
            f"{config.elbo.kl_weight:g} (divided by {config.elbo.normalization.value}), "
            f"schedule {config.elbo.schedule.name}, prior {config.elbo.prior.name}"
        )
    if any(any(stochastic_layers(module)) for module in modules):
        found["weight draws"] = run.algorithm.weight_draws()
    return found


def is_penalized(run: Run) -> bool:
    """Return True if any network has a divergence, or another penalty, for ``elbo`` to weigh."""
    return any(any(penalized_layers(module)) for module in run.algorithm.trained_modules().values())


def comparing_options(config: TrainConfig, run: Run) -> dict[str, bool | int | float | str]:
    """Return the options that trackers compare runs by, those of the divergence where there is any."""
    options = compared_options(config)
    return {k: v for k, v in options.items() if is_penalized(run) or not k.startswith("elbo.")}


def comparing_metrics(run: Run) -> list[str]:
    """Return the names of the scalars that trackers compare runs by."""
    return ["eval/mean_success"] * run.suite.has_success + ["eval/mean_return"]


COMMAND = RunCommand("train", run_config, as_built, is_done)


def command() -> None:
    """Run the command line."""
    run_training(COMMAND)
