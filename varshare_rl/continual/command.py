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
    resume=null                a run folder to go on with
    -m seed=0,1                a sweep: a run for every value, or for every combination of several

All keys: docs/continual.md and docs/configuration.md; --cfg job shows them with their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from varshare_rl.cli import new_run_dir, run_command
from varshare_rl.config_checks import check_config
from varshare_rl.continual.config import ContinualConfig, load_continual_config
from varshare_rl.continual.sequence import SequenceRun, build_sequence
from varshare_rl.continual.tasks import new_tasks
from varshare_rl.errors import Terminated, UserError
from varshare_rl.overrides import override
from varshare_rl.run.folder import CONFIG_FILE, held_folder, new_folder
from varshare_rl.run.loop import Interrupted


def main(composed: DictConfig) -> None:
    """Learn as configured; called by Hydra, once per job of a sweep."""
    config = cast(ContinualConfig, OmegaConf.to_object(composed))
    try:
        run_config(config, HydraConfig.get().overrides.task)
    except Interrupted as stop:
        raise SystemExit(stop.exit_code) from None


def run_config(config: ContinualConfig, overrides: Sequence[str] = ()) -> Path:
    """Learn a new sequence, or go on with ``config.resume``, and return the run folder.

    Raises:
        UserError: whatever the user got wrong.
        Interrupted: a signal came; all is saved, and the screen says how to go on.
    """
    if config.resume is not None:
        run_dir = Path(config.resume)
        config = stored_config(run_dir, overrides)
        with held_folder(run_dir):
            sequence = build_sequence(config, run_dir)
            sequence.load()
            learn(sequence)
        return run_dir
    check_config(config)
    parts = (new_tasks(config)[0].suite.name, config.algorithm.name, config.method.name, f"s{config.seed}")
    with new_folder(new_run_dir(config.run_dir, parts), numbered=config.run_dir is None) as run_dir:
        learn(build_sequence(config, run_dir))
    return run_dir


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
    config = load_continual_config(run_dir / CONFIG_FILE)
    if (run_dir / "summary.json").exists():
        raise UserError(f"{run_dir} has learnt all its tasks already; its results are in summary.json")
    return config


def command() -> None:
    """Run the command line."""
    run_command("continual", main)
