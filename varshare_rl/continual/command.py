"""The command line of ``python -m varshare_rl.continual``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from varshare_rl.cli import new_run_dir, run_command
from varshare_rl.config_checks import check_config
from varshare_rl.continual.config import ContinualConfig, load_continual_config
from varshare_rl.continual.loading import build_sequence
from varshare_rl.continual.parts import new_places
from varshare_rl.errors import UserError
from varshare_rl.files import make_run_dir, write_atomically
from varshare_rl.run.loop import Interrupted


def command() -> None:
    """The command line."""
    run_command("continual", main)


def main(composed: DictConfig) -> None:
    """Learn as configured; called by Hydra, once per job of a sweep."""
    config = cast(ContinualConfig, OmegaConf.to_object(composed))
    resumed = config.resume
    if resumed is not None:
        run_dir = Path(resumed)
        config = stored_config(run_dir)
    else:
        check_config(config)
        suite = new_places(config)[0].suite.name
        run_dir = new_run_dir(config.run_dir, (suite, config.algorithm.name, config.method.name, f"s{config.seed}"))
    sequence = build_sequence(config, run_dir)
    if resumed is None:
        make_run_dir(run_dir)
        write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(sequence.config)))
    else:
        sequence.load()
    try:
        sequence.learn()
    except Interrupted as stop:
        sequence.console.message(
            f"stopped by {stop}, all saved; go on with:\n"
            f"    python -m varshare_rl.continual {shlex.quote(f'resume={run_dir}')}"
        )
        raise SystemExit(stop.exit_code) from None


def stored_config(run_dir: Path) -> ContinualConfig:
    """The configuration of a run to go on with. Raises UserError if there is none, or if options are given."""
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir} to resume; give the folder of a run (runs/<name>)")
    given = [item for item in HydraConfig.get().overrides.task if not item.startswith("resume=")]
    if given:
        raise UserError(f"{given[0]} cannot be changed when a sequence of tasks is resumed; give resume= alone")
    config = load_continual_config(run_dir / "config.yaml")
    if (run_dir / "summary.json").exists():
        raise UserError(f"{run_dir} has learnt all its tasks already; its results are in summary.json")
    return config
