"""One agent learns one task after another, by the loop that trains all agents."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from torch import Tensor

from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import TrainedAgent, build_run, choose_device, prepare_process, run_provenance
from varshare_rl.config import Device, TableRows, TrainConfig, check_unchanged, fixed_options
from varshare_rl.continual.agent import (
    all_pretrained,
    beside_networks,
    check_spaces,
    go_on_from,
    load_pretrained,
    log_stds_of,
    pooled_normalizer,
    pretrained_normalizers,
    probe,
)
from varshare_rl.continual.config import (
    ContinualConfig,
    TaskIds,
    load_continual_config,
    train_config,
)
from varshare_rl.continual.evaluation import SEED_STEP, Evaluator, visited
from varshare_rl.continual.results import Progress, average, document, logged_evaluations
from varshare_rl.continual.tasks import SequenceTask, measure, named_apart, new_tasks, pretrained_tasks
from varshare_rl.data.normalizers import ObservationNormalizer
from varshare_rl.errors import UserError
from varshare_rl.files import write_atomically, write_json
from varshare_rl.run.checkpoint import fitting, newest_checkpoint, save_checkpoint
from varshare_rl.run.console import Console
from varshare_rl.run.evaluation import shown
from varshare_rl.run.process import seed_everything
from varshare_rl.run.tracker import Tracker
from varshare_rl.run_files import CONFIG_FILE, SUMMARY_FILE
from varshare_rl.transfer.method import state_copy
from varshare_rl.transfer.networks import AgentNetworks, CriticCarry
from varshare_rl.types import Metrics, Tree

TASKS_FOLDER = "tasks"


def build_sequence(config: ContinualConfig, run_dir: Path) -> SequenceRun:
    """Make a sequence before its first task, with the networks of the agent that it goes on from, if there is one.

    Raises:
        UserError: the agent cannot be gone on from, or the tasks cannot be a sequence.
    """
    agent = load_pretrained(config, config.device)
    return SequenceRun(config if agent is None else go_on_from(config, agent), run_dir, agent)


def load_sequence(run_dir: Path, kind: str, device: Device) -> tuple[SequenceRun, Path]:
    """Load a sequence with the tasks that it has learnt by now; also returns the checkpoint that they are from.

    Raises:
        UserError: there is no such sequence or checkpoint, or this version cannot read it.
    """
    if kind != "last":
        raise UserError(
            f"checkpoint={kind}: {run_dir} is a sequence of tasks, which keeps its last checkpoint only"
        )
    sequence = build_sequence(replace(load_continual_config(run_dir / CONFIG_FILE), device=device), run_dir)
    return sequence, sequence.load()


class SequenceRun:
    """Learns the tasks in turn and evaluates all of them after each.

    Args:
        config: checked.
        run_dir: its folder.
        agent: the trained agent that it goes on from, or None.

    Attributes:
        tasks: all of them, the agent's first; old_tasks: number of these.
    """

    def __init__(self, config: ContinualConfig, run_dir: Path, agent: TrainedAgent | None) -> None:
        self.config, self.run_dir = config, run_dir
        self.device = choose_device(config.device)
        old, new = pretrained_tasks(agent), new_tasks(config)
        self.old_tasks, self.tasks = len(old), old + named_apart(old, new)
        self.transitions_per_task = config.total_transitions // len(new)
        if self.transitions_per_task < 1:
            raise UserError(
                f"total_transitions is {config.total_transitions} for {len(new)} tasks; give at least one for each"
            )
        evaluations = max(self.transitions_per_task // (config.evaluate.every or self.transitions_per_task), 1)
        if evaluations < config.averaged_evaluations:
            raise UserError(
                f"averaged_evaluations is {config.averaged_evaluations}, and a task has {evaluations}: "
                f"{self.transitions_per_task} transitions, evaluate.every={config.evaluate.every}"
            )
        prepare_process(config.seed, config.matmul_precision)
        first = new[0]
        assert first.alone is not None
        if agent is not None:
            check_spaces(config, agent, first.suite)
        self.actor, self.critic, specs = probe(train_config(config, env=first.env), first.alone, self.device)
        self.networks = AgentNetworks(
            specs, config.method.build, config.carry.critic, all_pretrained(agent, config.carry.critic)
        )
        self.progress = Progress(normalizers=pretrained_normalizers(agent))
        if agent is not None:
            self.progress.log_stds = log_stds_of(cast(ActorCritic, agent.algorithm).actor)
        self.evaluator = Evaluator(config, self.tasks, self.networks, self.actor, self.progress, self.device)
        all_tasks = config.log.tasks is TableRows.all
        self.console = Console(config.total_transitions, quiet=config.log.quiet, all_tasks=all_tasks)
        self.started = self.task_started = time.monotonic()  # as if nothing had come between

    @property
    def learnt(self) -> int:
        """Tasks learnt by now, those before the sequence among them."""
        return self.old_tasks + len(self.progress.costs)

    @property
    def transitions(self) -> int:
        """Transitions set apart for the tasks learnt by now."""
        return len(self.progress.costs) * self.transitions_per_task

    def learn(self) -> None:
        """Go through the tasks that are left, and write the summary.

        Raises:
            Interrupted: a signal came; everything has been saved.
        """
        self.started = time.monotonic() - self.progress.seconds
        resumed = bool(self.progress.rows)
        self.tracker = Tracker(
            self.run_dir,
            self.transitions if resumed else None,
            self.progress.seconds,
            self.config.log.trackers,
        )
        try:
            if not self.progress.rows:
                self._evaluate()
                self._save()
                write_atomically(self.run_dir / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.structured(self.config)))
            while self.learnt < len(self.tasks):
                folder = self._folder(self.learnt)
                self._learn_task(self.learnt, folder)
                self._evaluate(folder)
                self._save()
                self._report(folder)
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # not before all of it is in another
        finally:
            self.tracker.close()
            self.evaluator.close()
        write_json(self.run_dir / SUMMARY_FILE, document(self.config, self.tasks, self.progress, self.provenance()))
        self.console.message(f"done: {self.run_dir / 'summary.json'}")

    def provenance(self) -> dict[str, Any]:
        """Return the provenance of its results."""
        return run_provenance(train_config(self.config), self.tasks[-1].suite, self.device)

    def _report(self, folder: Path) -> None:
        """Write the method's report of losses, such as Share's errors by layer and task."""
        rows = self.networks.method.report
        if rows:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "report.json", {"rows": rows})
            worst = max(rows, key=lambda row: float(row["error"]))
            self.console.message(
                f"basis of {rows[0]['merges']} merges: largest error {worst['error']:.2g} "
                f"(task {self.tasks[worst['task']].name}, {worst['layer']}); all in {folder / 'report.json'}"
            )

    def _folder(self, number: int) -> Path:
        name = f"{number - self.old_tasks:02d}_{self.tasks[number].name.replace(' ', '_')}"
        return self.run_dir / TASKS_FOLDER / name

    def _learn_task(self, number: int, folder: Path) -> None:
        """Train on one task and keep its results."""
        task, position = self.tasks[number], number - self.old_tasks
        self.task_started = time.monotonic()
        similar = self.evaluator.most_similar(task, self.learnt) if self._wants_similar() else None
        config = train_config(
            self.config,
            env=task.env,
            seed=(self.config.seed + SEED_STEP * position) % 2**32,
            total_transitions=self.transitions_per_task,
        )
        config.algorithm = replace(
            config.algorithm, learning_rate=config.algorithm.learning_rate * self.networks.method.lr_scale
        )
        seed_everything(config.seed)
        self.networks.begin(number, similar)
        entry: dict[str, Any] = {"trained_parameters": self.networks.trained_parameters(), "transitions": 0}
        self.console.message(
            f"task {position + 1} of {len(self.tasks) - self.old_tasks}: {task.name}, "
            f"{entry['trained_parameters']:,} parameters of the policy learn"
        )
        if entry["trained_parameters"]:
            entry["transitions"] = self._train(task, config, folder, similar)
            curve = self._curve(folder)
        else:
            curve = {"transitions": [0.0], "success": [self._score(self.progress.rows[-1], number)]}
            self.networks.skip()
            self.progress.normalizers.append(self._inherited_normalizer(similar))
            self.progress.log_stds += self.progress.log_stds[-1:] or log_stds_of(self.actor)
            self.progress.units.append({})
        self.progress.curves.append(curve)
        entry["stored_bytes"] = asdict(self.networks.stored())
        entry["seconds"] = round(time.monotonic() - self.task_started, 3)
        self.progress.costs.append(entry)

    def _train(self, task: SequenceTask, config: TrainConfig, folder: Path, similar: int | None) -> int:
        """Run the loop on one task, or its rest, and let the methods keep its results; returns its transitions.

        Raises:
            Interrupted: a signal came; the state has been saved.
        """
        assert task.alone is not None
        state = self._unfinished(folder)
        resumed_at, seconds = (None, 0.0) if state is None else (state["transitions"], state["seconds"])
        self.task_started -= seconds  # that it has taken before it was interrupted,
        self.started -= seconds  # which no checkpoint of the sequence knows of
        run = build_run(config, task.alone, folder, resumed_at, seconds, self.networks)
        run.also_evaluate = self._evaluate_meanwhile
        agent = cast(ActorCritic, run.algorithm)
        try:
            if state is None:
                self._hand_over(agent, similar)
                run.start(evaluate=True)  # the network that learns may not be the one that acted here so far
            else:
                run.load_state(state)
            run.train()
            obs, action = visited(agent, run.engine, self.config.memory_transitions)
        finally:
            run.close()
        self.progress.log_stds += log_stds_of(agent.actor)
        for reader, learnt in ((self.actor, agent.actor), (self.critic, agent.critic)):
            reader.load_state_dict(beside_networks(learnt), strict=False)  # what outputs mean to the methods
        self.networks.end(obs, action)
        self.progress.normalizers.append(state_copy(agent.normalizer))
        self.progress.units.append(beside_networks(agent.critic))
        self.progress.carried = self._taken_over(agent)
        return run.transitions

    def _curve(self, folder: Path) -> dict[str, list[float]]:
        """Read the evaluations that a task's training has logged."""
        name = f"eval/mean_{measure(self.tasks)}"
        logged = logged_evaluations(folder)
        return {
            "transitions": [float(entry["transitions"]) for entry in logged],
            "success": [float(entry[name]) for entry in logged],
        }

    def _unfinished(self, folder: Path) -> Tree | None:
        """Load the state of a task that was interrupted; a folder that cannot be gone on with is removed."""
        if not list((folder / "checkpoints").glob("last-*")):  # a best one alone is not enough to go on
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return newest_checkpoint(folder)[1]

    def _inherited_normalizer(self, similar: int | None) -> dict[str, Tensor]:
        """Return statistics of observations for a new task: those of the similar task, or of the last one.

        After an agent of several tasks they are those of all of them together.
        """
        known = self.progress.normalizers
        if similar is not None:
            return known[similar]
        if not known:
            size = self.networks.specs["actor"][0].in_features
            return state_copy(ObservationNormalizer(1, size, enabled=True))
        return pooled_normalizer(known) if self.learnt == self.old_tasks else known[-1]

    def _hand_over(self, agent: ActorCritic, similar: int | None) -> None:
        """Give the new task's training its part of the last one's state."""
        if self.progress.normalizers:
            agent.normalizer.load_state_dict(self._inherited_normalizer(similar))
        units = self._units(similar)
        if units is not None:
            agent.take_over_critic(units)
        carried = self.progress.carried
        if carried is None:
            return
        if self.config.carry.optimizer:
            agent.actor_step.load_state(carried["actor_step"])
            moments: dict[Any, Any] = agent.actor_step.optimizer.state
            moments.pop(getattr(agent.actor, "log_stds", None), None)  # they begin anew
        if self.config.carry.replay:
            cast(Any, agent).replay.load_state(carried["replay"])

    def _units(self, similar: int | None) -> dict[str, Tensor] | None:
        """Return the units of the outputs that the new task's critic begins with; None: fresh ones."""
        if self.config.carry.critic is CriticCarry.finetune:
            return self.progress.carried and self.progress.carried["critic"]
        if self.config.carry.critic is CriticCarry.fresh:
            return None
        start = self.networks.methods["critic"][0].starts_from(similar)
        known = dict(enumerate(self.progress.units, start=self.old_tasks))
        return None if start is None else known.get(start)

    def _taken_over(self, agent: ActorCritic) -> Tree:
        """Return the critic's heads and units, and what else ``carry`` gives to the next task's training."""
        carried: Tree = {"critic": beside_networks(agent.critic)}
        if self.config.carry.optimizer:
            carried["actor_step"] = agent.actor_step.state()
        if self.config.carry.replay:
            carried["replay"] = cast(Any, agent).replay.state()
        return carried

    def _score(self, row: dict[str, list[float | None]], number: int) -> float:
        value = row[measure(self.tasks)][number]
        assert value is not None
        return value

    def _evaluate_meanwhile(self, transitions: int) -> Metrics:
        """Evaluate the learnt tasks while the next one is, where that is averaged: ``continual/<task>/<name>``."""
        left = self.transitions_per_task - transitions
        if not self.learnt or not 0 < left <= (self.config.averaged_evaluations - 1) * self.config.evaluate.every:
            return {}
        acting = self.evaluator.acting(self.learnt)
        played = self.evaluator.play(acting, self.config.evaluate.episodes, meanwhile=True)
        return {
            f"continual/{task.name}/{name}": value
            for task, result in zip(self.tasks[: self.learnt], played, strict=False)
            for name in ("success", "return")
            if (value := result[name]) is not None
        }

    def _evaluate(self, folder: Path | None = None) -> None:
        """Evaluate all tasks and note the row; ``folder`` is that of the task just learnt."""
        learnt = self.learnt
        acting = self.evaluator.acting(learnt)
        played = self.evaluator.play(acting, self.config.evaluate.episodes)
        row = {name: [result[name] for result in played] for name in ("success", "return")}
        if folder is not None and self.progress.costs[-1]["transitions"]:
            learnt_names = [task.name for task in self.tasks[:learnt]]
            average(row, learnt_names, logged_evaluations(folder), self.config.averaged_evaluations)
        if self.config.task_ids is TaskIds.hidden:
            row["acted_as"] = [None if number is None else float(number) for number in acting]
        self.progress.rows.append(row)
        names = [task.name for task in self.tasks]
        scores = [self._score(row, number) for number in range(len(names))]
        metrics = {f"continual/{name}": score for name, score in zip(names, scores, strict=True)}
        seen = scores[:learnt] or scores
        self.tracker.log(metrics | {"continual/mean_of_learnt": sum(seen) / len(seen)}, self.transitions)
        rows = shown(dict(zip(names, played, strict=True)))
        self.console.table(f"all tasks after {learnt - self.old_tasks}", rows)

    def _wants_similar(self) -> bool:
        start = getattr(self.config.method, "start", None)
        return getattr(start, "value", None) == "similar" and self.learnt > 0

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self.started
        tree: Tree = {
            "progress": vars(self.progress),
            "governor": self.networks.state(),
            "options": fixed_options(self.config),
        }
        save_checkpoint(self.run_dir, "last", self.transitions, tree, self.config.checkpoint.keep)

    def load(self) -> Path:
        """Put back the newest checkpoint of the folder, and say which it was."""
        checkpoint, tree = newest_checkpoint(self.run_dir)
        with fitting(self.run_dir):
            check_unchanged(self.run_dir, self.config, tree)
            earlier = self.progress.log_stds  # of a pretrained agent
            self.progress = self.evaluator.progress = progress = Progress(**tree["progress"])
            progress.log_stds = progress.log_stds or earlier
            missing = len(progress.normalizers) - len(progress.log_stds)  # in folders of former versions
            progress.log_stds += log_stds_of(self.actor) * missing
            self.networks.load_state(tree["governor"])
        return checkpoint
