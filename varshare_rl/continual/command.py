"""Learn one task after another with one agent.

    python -m varshare_rl.continual env=light8 method=share

    env=light8                 pointmass, cw10, cw20, or any list of tasks as for train
    method=share               finetune, copies, frozen, shared_private, ewc, replay, packnet, pnn, lora, varshare
    algorithm=ppo              or sac
    total_transitions=480000   the budget, divided equally among the tasks; its default is the environment's
    from=null                  the run folder of a trained agent to go on from
    task_ids=known             or hidden: the policy is not told in evaluation which task it is in
    repeats=1                  how many times the tasks come round
    network.hidden=[64,64]     sizes of the hidden layers
    seed=0                     of everything random
    run_dir=null               the run folder; null: runs/<what it is>_<time>
    resume=null                a run folder to go on with; auto: the one of this name, if it holds a run
    -m seed=0,1                a sweep: a run for every value, or for every combination of several; the same command
                               again goes on (docs/sweeps.md)

All keys: docs/continual.md and docs/configuration.md; --cfg job shows them with their values.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from varshare_rl.config import AUTO, check_same
from varshare_rl.continual.config import ContinualConfig, check_new, load_continual_config
from varshare_rl.continual.sequence import SequenceRun, build_sequence
from varshare_rl.continual.tasks import new_tasks
from varshare_rl.errors import Terminated, UserError
from varshare_rl.overrides import override
from varshare_rl.run.folder import held_folder, name_folder, new_folder
from varshare_rl.run.signals import Interrupted
from varshare_rl.run_files import CONFIG_FILE, SUMMARY_FILE
from varshare_rl.sweeps.command import RunCommand, say_done
from varshare_rl.sweeps.sweep import run_training


def run_config(config: ContinualConfig, overrides: Sequence[str] = ()) -> Path:
    """Learn a new sequence, or go on with ``config.resume``, and return the run folder.

    Raises:
        UserError: whatever the user got wrong.
        Interrupted: a signal came; all is saved, and the screen says how to go on.
    """
    if config.resume is not None and config.resume != AUTO:
        run_dir = Path(config.resume)
        go_on(run_dir, stored_config(run_dir, overrides))
        return run_dir
    check_new(config)
    auto, overwrite = config.resume is not None, config.overwrite
    config = replace(config, resume=None, overwrite=False)  # which are not the run's
    parts = (new_tasks(config)[0].suite.name, config.algorithm.name, config.method.name, f"s{config.seed}")
    wanted = name_folder(config.run_dir, parts, dated=not auto)
    if auto and (wanted / CONFIG_FILE).exists():
        config = as_built(config)
        if not is_done(wanted, config):
            go_on(wanted, config)
        else:
            say_done(wanted, config, config_of(wanted))
        return wanted
    if overwrite:
        as_built(config)  # before anything is lost
    with new_folder(wanted, config.run_dir is None and not auto, overwrite) as run_dir:
        learn(build_sequence(config, run_dir))
    return run_dir


def as_built(config: ContinualConfig) -> ContinualConfig:
    """Check a configuration as a start would, by building its networks, and return what ``config.yaml`` would have.

    Raises:
        UserError: whatever the user got wrong.
    """
    check_new(config)
    sequence = build_sequence(config, Path(os.devnull))
    sequence.evaluator.close()
    return sequence.config


def config_of(run_dir: Path) -> ContinualConfig:
    """Read the configuration of the sequence in a folder."""
    return load_continual_config(run_dir / CONFIG_FILE)


def is_done(run_dir: Path, config: ContinualConfig) -> bool:
    """Return True if the sequence in a folder is that of ``config``, as built, and has come to its end.

    Raises:
        UserError: it is another.
    """
    check_same(run_dir, config, config_of(run_dir))
    return (run_dir / SUMMARY_FILE).exists()


def go_on(run_dir: Path, config: ContinualConfig) -> None:
    """Learn the tasks that are left in ``run_dir``."""
    with held_folder(run_dir):
        sequence = build_sequence(config, run_dir)
        sequence.load()
        learn(sequence)


def learn(sequence: SequenceRun) -> None:
    """Learn the tasks that are left; on a signal, say how to go on and pass it on."""
    try:
        sequence.learn()
    except (Interrupted, KeyboardInterrupt, Terminated) as stop:
        if (sequence.run_dir / CONFIG_FILE).exists():
            what = f"stopped by {stop}, all saved" if isinstance(stop, Interrupted) else "stopped at once"
            command = f"python -m varshare_rl.continual {override('resume', sequence.run_dir)}"
            sequence.console.message(f"{what}; go on with:\n    {command}")
        raise


def stored_config(run_dir: Path, overrides: Sequence[str]) -> ContinualConfig:
    """Read the configuration of a run to go on with. Raises UserError if there is none, or options are given."""
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir} to resume; give the folder of a run (runs/<name>)")
    given = [item for item in overrides if not item.startswith("resume=")]
    if given:
        raise UserError(f"{given[0]} cannot be changed when a sequence of tasks is resumed; give resume= alone")
    config = config_of(run_dir)
    if (run_dir / SUMMARY_FILE).exists():
        raise UserError(f"{run_dir} has learnt all its tasks already; its results are in summary.json")
    return config


COMMAND = RunCommand("continual", run_config, as_built, config_of, is_done)


def command() -> None:
    """Run the command line."""
    run_training(COMMAND)
