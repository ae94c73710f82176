"""``python -m varshare_rl.evaluate run=runs/<folder> episodes=50``: evaluate a trained agent, or a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from varshare_rl.assemble import load_agent, parameter_count, run_provenance
from varshare_rl.cli import run_command
from varshare_rl.config import Device, is_sequence
from varshare_rl.continual.results import evaluation_document
from varshare_rl.continual.sequence import load_sequence
from varshare_rl.errors import UserError
from varshare_rl.files import write_json
from varshare_rl.run.console import Console
from varshare_rl.run.evaluation import evaluate
from varshare_rl.run.results import summary

#: Means over a task's episodes, by task name.
Tasks = Mapping[str, Mapping[str, float | None]]


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
    result, tasks = evaluate_sequence(options) if is_sequence(run_dir) else evaluate_agent(options)
    write_json(run_dir / "evaluation.json", result)
    console = Console(result["transitions"])
    console.table(f"{options.episodes} episodes per task of {result['conditions']['checkpoint']}", tasks)
    console.message(f"written: {run_dir / 'evaluation.json'}")


def evaluate_agent(options: EvaluateConfig) -> tuple[dict[str, Any], Tasks]:
    """What ``evaluation.json`` says of a training run, and all means over the tasks' episodes."""
    agent = load_agent(Path(options.run), options.checkpoint, options.device)
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
        provenance={
            **run_provenance(config, suite, agent.device),
            **_of_evaluation(options, seed, agent.checkpoint),
        },
    )
    return result, evaluation.tasks


def evaluate_sequence(options: EvaluateConfig) -> tuple[dict[str, Any], Tasks]:
    """The same of a sequence, each of whose tasks has the policy that it is acted with by now."""
    sequence, checkpoint = load_sequence(Path(options.run), options.checkpoint, options.device)
    seed = sequence.config.seed if options.seed is None else options.seed
    evaluator = sequence.evaluator.with_seed(seed)
    try:
        acting = evaluator.acting(sequence.learnt)
        played = evaluator.play(acting, options.episodes)
    finally:
        evaluator.close()
    provenance = {**sequence.provenance(), **_of_evaluation(options, seed, checkpoint)}
    result = evaluation_document(sequence.config, sequence.tasks, sequence.progress, acting, played, provenance)
    return result, {task.name: row for task, row in zip(sequence.tasks, played, strict=True)}


def _of_evaluation(options: EvaluateConfig, seed: int, checkpoint: Path) -> dict[str, Any]:
    return {
        "evaluation_seed": seed,
        "episodes_per_task": options.episodes,
        "checkpoint": checkpoint.name,
    }


def command() -> None:
    """Run the command line."""
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    run_command("evaluate", main)
