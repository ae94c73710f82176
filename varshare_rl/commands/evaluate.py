"""Evaluate a trained agent, or a sequence of tasks: success and return of every task.

    python -m varshare_rl.evaluate run=runs/<folder> episodes=50
    python -m varshare_rl.evaluate run=runs/<folder> protocol=official

    run=<folder>       a run folder (needed); what is found is written into it
    protocol=null      goals (every goal once), official (Meta-World's own evaluation) or quick (5 episodes)
    episodes=null      of every task, instead of a protocol; null: 50
    checkpoint=last    or best
    video=false        films of an episode of every task, and of all side by side
    deterministic=true false: draw actions as in training, with its noise
    draw=null          weights: mean, per_episode, per_step; null: the run's own, which is mean
    device=auto        or cpu, cuda
    seed=null          of the episodes' starts; null: the run's own

Each kind has a file of its own: evaluation.json, evaluation_best.json, evaluation_official.json, ...
All keys: docs/configuration.md, or --cfg job. Protocols: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig

from varshare_rl.assemble import TrainedAgent, load_agent, parameter_count, run_provenance
from varshare_rl.cli import run_command
from varshare_rl.commands.common import evaluation_engine, evaluation_seed, read_options
from varshare_rl.config import Device, is_sequence
from varshare_rl.continual.results import evaluation_document
from varshare_rl.continual.sequence import load_sequence
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.files import whole_folder, write_json
from varshare_rl.nn.layer import posterior_layers
from varshare_rl.nn.weight_sampler import Resample
from varshare_rl.run.console import Console, counted
from varshare_rl.run.evaluation import Evaluation, evaluate, evaluate_officially, shown
from varshare_rl.run.process import own_random
from varshare_rl.run.results import evaluation_file, summary
from varshare_rl.run.video import GRID, film, require_encoder, write_films

#: Means over a task's episodes, by task name.
Tasks = Mapping[str, Mapping[str, float | None]]

#: Episodes of every task where nothing else says how many and in Meta-World's evaluation; of ``protocol=quick``.
EPISODES, QUICK_EPISODES = 50, 5


class Protocol(Enum):
    """Episodes of an evaluation."""

    goals = "goals"
    official = "official"
    quick = "quick"


@dataclass
class EvaluateConfig:
    """Options of ``evaluate``."""

    run: str = MISSING
    "Folder of the run, also that of a sequence of tasks."
    protocol: Protocol | None = None
    """Every goal once (`goals`), the evaluation that the authors of the suite publish (`official`: Meta-World), 5
    episodes (`quick`); null: `episodes`."""
    episodes: int | None = bounded(None, least=1)
    "Episodes of every task; null: those of `protocol`, or 50."
    checkpoint: str = "last"
    "Checkpoint of the run: `last` or `best`."
    deterministic: bool = True
    "Take the most likely actions; false: draw them as in training, with `algorithm.noise_correlation`."
    draw: Resample | None = None
    "How the policy's weights are drawn, as in `elbo.draw.evaluation`; null: as the run says, which is `mean`."
    video: bool = False
    "Also write a film of an episode of every task, and one of all side by side, into `video/`."
    device: Device = Device.auto
    "Device to compute on; `auto` takes CUDA if there is any."
    seed: int | None = bounded(None, least=0, most=2**32 - 1)
    "Seed of the episodes' starts; null: the run's own."

    def check(self, prefix: str) -> None:
        """Refuse a number of episodes beside a protocol, which has its own. Raises UserError."""
        if self.protocol is not None and self.episodes is not None:
            raise UserError(
                f"protocol={self.protocol.value} and episodes={self.episodes} are both given; a protocol says how "
                "many: leave one of them out"
            )

    @property
    def names(self) -> dict[str, str | None]:
        """Protocol, actions and draws as results and file names have them."""
        return {
            "protocol": None if self.protocol is None else self.protocol.value,
            "actions": None if self.deterministic else "stochastic",
            "draw": None if self.draw is None else self.draw.value,
        }


def main(composed: DictConfig) -> None:
    """Evaluate as configured, write the result into the run folder, and show it."""
    options = read_options(composed, EvaluateConfig)
    run_dir, video = Path(options.run), None
    if is_sequence(run_dir):
        result, tasks = evaluate_sequence(options)
    else:
        if options.video:
            require_encoder()
        agent = load_agent(run_dir, options.checkpoint, options.device)
        video = film_agent(agent, options) if options.video else None  # it may be refused, and is quick
        result, tasks = evaluate_agent(agent, options)
    path = run_dir / evaluation_file(options.checkpoint, **options.names)
    conditions = result["conditions"]
    episodes = conditions["episodes_per_task"]
    console = Console(result["transitions"], all_tasks=True)
    console.table(f"{counted(episodes, 'episode')} per task of {conditions['checkpoint']}", shown(tasks))
    console.message(f"written: {path}")
    if video is not None:
        console.message(f"written: {video / GRID}, and a film of every task beside it")


def evaluate_agent(agent: TrainedAgent, options: EvaluateConfig) -> tuple[dict[str, Any], Tasks]:
    """Evaluate the agent of a training run and write the result; also returns all means over the episodes.

    Raises:
        UserError: the suite or the network has no such evaluation.
    """
    seed = evaluation_seed(agent, options.seed)
    evaluation, episodes = _played(agent, options, seed)
    result = summary(
        tasks=evaluation.tasks,
        transitions=agent.state["transitions"],
        updates=agent.state["updates"],
        seconds=agent.state["seconds"],
        parameters=parameter_count(agent.algorithm, len(agent.suite.task_names)).as_dict(),
        provenance={
            **run_provenance(agent.config, agent.suite, agent.device),
            **_of_evaluation(options, episodes, seed, agent.checkpoint),
        },
    )
    kind = agent.checkpoint.name.partition("-")[0]
    write_json(Path(options.run) / evaluation_file(kind, **options.names), result)
    return result, evaluation.tasks


def film_agent(agent: TrainedAgent, options: EvaluateConfig) -> Path:
    """Write films of the agent's first episode of every task; returns their folder.

    Raises:
        UserError: the suite has no pictures, or nothing here draws or encodes them.
    """
    with _drawn(agent, options.draw):
        films = film(agent.algorithm, agent.suite, evaluation_seed(agent, options.seed), options.deterministic)
    folder = Path(options.run) / ("video" if agent.checkpoint.name.startswith("last") else "video_best")
    with whole_folder(folder) as made:
        write_films(films, made)
    return folder


def _played(agent: TrainedAgent, options: EvaluateConfig, seed: int) -> tuple[Evaluation, int]:
    """Play the episodes; also returns how many of every task."""
    episodes = episodes_of(options, agent.suite)
    with _drawn(agent, options.draw):
        if options.protocol is Protocol.official:
            found = evaluate_officially(agent.algorithm, agent.suite, episodes, seed, options.deterministic)
            return found, episodes
        with own_random(seed), evaluation_engine(agent, episodes, seed) as engine:
            found = evaluate(agent.algorithm, agent.suite, engine, episodes, deterministic=options.deterministic)
            return found, episodes


@contextmanager
def _drawn(agent: TrainedAgent, draw: Resample | None) -> Iterator[None]:
    """Inside, evaluation policies draw their weights so, where it is chosen. Raises UserError without posterior."""
    modules, chosen = agent.algorithm.trained_modules().values(), agent.config.elbo.draw
    if (
        draw is not None
        and draw is not Resample.mean
        and not any(any(posterior_layers(module)) for module in modules)
    ):
        raise UserError(
            f"draw={draw.value}: network={agent.config.network.name} has no posterior to draw from; leave it out"
        )
    before = chosen.evaluation
    chosen.evaluation = before if draw is None else draw
    try:
        yield
    finally:
        chosen.evaluation = before


def episodes_of(options: EvaluateConfig, *suites: Suite) -> int:
    """Return the episodes of every task that the options ask for, in suites that are played together."""
    if options.protocol is Protocol.quick:
        return QUICK_EPISODES
    if options.protocol is Protocol.goals:
        return max(suite.num_goals or EPISODES for suite in suites)
    return EPISODES if options.episodes is None else options.episodes


def evaluate_sequence(options: EvaluateConfig) -> tuple[dict[str, Any], Tasks]:
    """Evaluate a sequence, whose tasks have the policies that they are acted with by now, and write the result."""
    run_dir = Path(options.run)
    given = [f"draw={options.draw.value}"] if options.draw is not None else []
    given += ["deterministic=false"] * (not options.deterministic)
    given += ["protocol=official"] * (options.protocol is Protocol.official) + ["video=true"] * options.video
    if given:
        raise UserError(
            f"{given[0]} is for an agent of one training run, and {run_dir} is a sequence; leave it out"
        )
    sequence, checkpoint = load_sequence(run_dir, options.checkpoint, options.device)
    seed = sequence.config.seed if options.seed is None else options.seed
    episodes = episodes_of(options, *(task.suite for task in sequence.tasks))
    evaluator = sequence.evaluator.with_seed(seed)
    try:
        acting = evaluator.acting(sequence.learnt)
        played = evaluator.play(acting, episodes)
    finally:
        evaluator.close()
    provenance = {**sequence.provenance(), **_of_evaluation(options, episodes, seed, checkpoint)}
    result = evaluation_document(sequence.config, sequence.tasks, sequence.progress, acting, played, provenance)
    write_json(run_dir / evaluation_file("last", **options.names), result)
    return result, {task.name: row for task, row in zip(sequence.tasks, played, strict=True)}


def _of_evaluation(options: EvaluateConfig, episodes: int, seed: int, checkpoint: Path) -> dict[str, Any]:
    chosen = {name: value for name, value in options.names.items() if value is not None}
    return {"evaluation_seed": seed, "episodes_per_task": episodes, "checkpoint": checkpoint.name, **chosen}


def command() -> None:
    """Run the command line."""
    run_command("evaluate", main, EvaluateConfig)
