"""Attempts at a run: described on the screen, made again from the last checkpoint where they fail, summed up."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from varshare_rl.assemble import build_run, parameter_count
from varshare_rl.config import TrainConfig, compared_options, fixed_options
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import EpisodePlace, RunFailure, Terminated, UserError
from varshare_rl.files import DiskFull, write_atomically, write_json
from varshare_rl.nn.layer import penalized_layers
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.overrides import override
from varshare_rl.ranks import LostRank, Ranks
from varshare_rl.run.callbacks import Callbacks
from varshare_rl.run.checkpoint import CheckpointError, newest_checkpoint
from varshare_rl.run.console import counted
from varshare_rl.run.evaluation import Evaluation
from varshare_rl.run.loop import Diverged, Run
from varshare_rl.run.loop_config import OnDivergence
from varshare_rl.run.results import summary
from varshare_rl.run.signals import Interrupted
from varshare_rl.run_files import CONFIG_FILE, SUMMARY_FILE
from varshare_rl.types import Tree

#: Failures in a row, without having come further, after which a run is given up.
MOST_FAILURES = 2
#: Episodes of a task that a run leaves out because they fail: so many, or of a hundred that it has had so many.
MOST_LEFT_OUT, MOST_OF_A_HUNDRED = 5, 1
FAILURE_FILE = "failure.txt"


def built(config: TrainConfig, suite: Suite, run_dir: Path, state: Tree | None, ranks: Ranks) -> Run:
    """Build a run that is new, or goes on from ``state``; what fails on one of the ranks fails on all."""
    at, seconds = (None, 0.0) if state is None else (state["transitions"], state["seconds"])
    return ranks.together(lambda: build_run(config, suite, run_dir, at, seconds, ranks=ranks))


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
            halvings = diverged + halvings * (state["transitions"] == before)
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
            **describe_ranks(config, run.ranks),
            "transitions": f"{config.total_transitions:,} in total",
            "time": "left is told after the first updates; Ctrl-C saves, and resume goes on",
        },
    )


def describe_ranks(config: TrainConfig, ranks: Ranks) -> dict[str, str]:
    """Describe the division of the work among processes, if there is one, or should be."""
    if ranks.size > 1:
        return {"ranks": f"{ranks.size}, which divide environments and batches"}
    if config.tasks_per_rank is not None:
        return {"ranks": f"1, with all tasks; tasks_per_rank={config.tasks_per_rank} is for several (torchrun)"}
    return {}


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
