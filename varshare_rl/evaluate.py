"""``python -m varshare_rl.evaluate run=runs/<folder> episodes=50``: evaluate a trained agent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from varshare_rl.assemble import (
    build_algorithm,
    build_suite,
    choose_device,
    parameter_count,
    run_conditions,
    set_matmul_precision,
)
from varshare_rl.cli import run_command
from varshare_rl.config import Device, load_config
from varshare_rl.files import write_json
from varshare_rl.run.checkpoint import find_checkpoint, load_checkpoint
from varshare_rl.run.console import Console
from varshare_rl.run.evaluation import evaluate
from varshare_rl.run.results import summary
from varshare_rl.run.seeding import seed_everything
from varshare_rl.types import UserError


@dataclass
class EvaluateConfig:
    """Which run, which of its checkpoints (``last`` or ``best``), and how many episodes per task."""

    run: str = MISSING
    episodes: int = 50
    checkpoint: str = "last"
    device: Device = Device.auto
    seed: int | None = None  # of the starts; the run's own unless given


def main(composed: DictConfig) -> None:
    """Evaluate as configured and write ``evaluation.json`` into the run folder."""
    if OmegaConf.is_missing(composed, "run"):
        raise UserError("run is missing; give the folder of a run: run=runs/<folder>")
    options = cast(EvaluateConfig, OmegaConf.to_object(composed))
    if options.episodes < 1:
        raise UserError(f"episodes is {options.episodes}; it must be at least 1")
    if options.checkpoint not in ("last", "best"):
        raise UserError(f"unknown checkpoint {options.checkpoint!r}; choose last or best")
    run_dir = Path(options.run)
    config = load_config(run_dir / "config.yaml")
    checkpoint = find_checkpoint(run_dir, options.checkpoint)
    state = load_checkpoint(checkpoint)
    device = choose_device(options.device)
    seed = config.seed if options.seed is None else options.seed
    seed_everything(config.seed)
    set_matmul_precision(config.matmul_precision)
    suite = build_suite(config)
    algorithm = build_algorithm(config, suite, device)
    algorithm.load_policy_state(state["algorithm"])
    engine = suite.make_engine(min(options.episodes, config.env.envs_per_task), seed, evaluation=True)
    try:
        evaluation = evaluate(algorithm, suite, engine, options.episodes)
    finally:
        engine.close()
    result = summary(
        tasks=evaluation.tasks,
        transitions=state["transitions"],
        updates=state["updates"],
        seconds=state["seconds"],
        parameters=parameter_count(algorithm, len(suite.task_names)).as_dict(),
        conditions={
            **run_conditions(config, suite, device),
            "evaluation_seed": seed,
            "episodes_per_task": options.episodes,
            "checkpoint": checkpoint.name,
        },
    )
    write_json(run_dir / "evaluation.json", result)
    console = Console(state["transitions"])
    console.table(f"{options.episodes} episodes per task of {checkpoint.name}", evaluation.tasks)
    console.message(f"written: {run_dir / 'evaluation.json'}")


if __name__ == "__main__":
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    run_command("evaluate", main)
