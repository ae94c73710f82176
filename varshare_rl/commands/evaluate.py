"""Evaluate a trained agent, or a sequence of tasks: success and return of every task.

    python -m varshare_rl.evaluate run=runs/<folder> episodes=50

    run=<folder>       a run folder (needed); evaluation.json is written into it
    episodes=50        of every task, with deterministic actions on the posterior mean
    checkpoint=last    or best
    device=auto        or cpu, cuda
    seed=null          of the episodes' starts; null: the run's own

All keys: docs/configuration.md, or --cfg job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig

from varshare_rl.assemble import TrainedAgent, load_agent, parameter_count, run_provenance
from varshare_rl.cli import run_command
from varshare_rl.commands.common import evaluation_engine, evaluation_seed, read_options
from varshare_rl.config import Device, is_sequence
from varshare_rl.continual.results import evaluation_document
from varshare_rl.continual.sequence import load_sequence
from varshare_rl.fields import bounded
from varshare_rl.files import write_json
from varshare_rl.run.console import Console
from varshare_rl.run.evaluation import evaluate
from varshare_rl.run.results import summary

#: Means over a task's episodes, by task name.
Tasks = Mapping[str, Mapping[str, float | None]]


@dataclass
class EvaluateConfig:
    """Options of ``evaluate``."""

    run: str = MISSING
    "Folder of the run, also that of a sequence of tasks."
    episodes: int = bounded(50, least=1)
    "Episodes of every task."
    checkpoint: str = "last"
    "Checkpoint of the run: `last` or `best`."
    device: Device = Device.auto
    "Device to compute on; `auto` takes CUDA if there is any."
    seed: int | None = bounded(None, least=0)
    "Seed of the episodes' starts; null: the run's own."


def main(composed: DictConfig) -> None:
    """Evaluate as configured, write ``evaluation.json`` into the run folder, and show it."""
    options = read_options(composed, EvaluateConfig)
    run_dir = Path(options.run)
    if is_sequence(run_dir):
        result, tasks = evaluate_sequence(options)
        write_json(run_dir / "evaluation.json", result)
    else:
        agent = load_agent(run_dir, options.checkpoint, options.device)
        result, tasks = evaluate_agent(agent, run_dir, options.episodes, options.seed)
    console = Console(result["transitions"])
    console.table(f"{options.episodes} episodes per task of {result['conditions']['checkpoint']}", tasks)
    console.message(f"written: {run_dir / 'evaluation.json'}")


def evaluate_agent(
    agent: TrainedAgent, run_dir: Path, episodes: int, seed: int | None = None
) -> tuple[dict[str, Any], Tasks]:
    """Evaluate the agent of a training run and write ``evaluation.json``; also all means over the episodes."""
    seed = evaluation_seed(agent, seed)
    with evaluation_engine(agent, episodes, seed) as engine:
        evaluation = evaluate(agent.algorithm, agent.suite, engine, episodes)
    result = summary(
        tasks=evaluation.tasks,
        transitions=agent.state["transitions"],
        updates=agent.state["updates"],
        seconds=agent.state["seconds"],
        parameters=parameter_count(agent.algorithm, len(agent.suite.task_names)).as_dict(),
        provenance={
            **run_provenance(agent.config, agent.suite, agent.device),
            **_of_evaluation(episodes, seed, agent.checkpoint),
        },
    )
    write_json(run_dir / "evaluation.json", result)
    return result, evaluation.tasks


def evaluate_sequence(options: EvaluateConfig) -> tuple[dict[str, Any], Tasks]:
    """Evaluate a sequence, each of whose tasks has the policy that it is acted with by now."""
    sequence, checkpoint = load_sequence(Path(options.run), options.checkpoint, options.device)
    seed = sequence.config.seed if options.seed is None else options.seed
    evaluator = sequence.evaluator.with_seed(seed)
    try:
        acting = evaluator.acting(sequence.learnt)
        played = evaluator.play(acting, options.episodes)
    finally:
        evaluator.close()
    provenance = {**sequence.provenance(), **_of_evaluation(options.episodes, seed, checkpoint)}
    result = evaluation_document(sequence.config, sequence.tasks, sequence.progress, acting, played, provenance)
    return result, {task.name: row for task, row in zip(sequence.tasks, played, strict=True)}


def _of_evaluation(episodes: int, seed: int, checkpoint: Path) -> dict[str, Any]:
    return {"evaluation_seed": seed, "episodes_per_task": episodes, "checkpoint": checkpoint.name}


def command() -> None:
    """Run the command line."""
    run_command("evaluate", main, EvaluateConfig)
