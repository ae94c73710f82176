"""``python -m varshare_rl.evaluate run=runs/<folder> episodes=50``: evaluate a trained agent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from varshare_rl.assemble import load_agent, parameter_count, run_conditions
from varshare_rl.cli import run_command
from varshare_rl.config import Device
from varshare_rl.files import write_json
from varshare_rl.run.console import Console
from varshare_rl.run.evaluation import evaluate
from varshare_rl.run.results import summary
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
    run_dir = Path(options.run)
    agent = load_agent(run_dir, options.checkpoint, options.device)
    config, suite, algorithm, state = agent.config, agent.suite, agent.algorithm, agent.state
    seed = config.seed if options.seed is None else options.seed
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
            **run_conditions(config, suite, agent.device),
            "evaluation_seed": seed,
            "episodes_per_task": options.episodes,
            "checkpoint": agent.checkpoint.name,
        },
    )
    write_json(run_dir / "evaluation.json", result)
    console = Console(state["transitions"])
    console.table(f"{options.episodes} episodes per task of {agent.checkpoint.name}", evaluation.tasks)
    console.message(f"written: {run_dir / 'evaluation.json'}")


if __name__ == "__main__":
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    run_command("evaluate", main)
