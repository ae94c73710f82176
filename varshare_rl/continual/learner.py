"""One agent learns one task after another, by the loop that trains all agents."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import TrainedAgent, build_run, choose_device, prepare_process, run_provenance
from varshare_rl.config import TrainConfig
from varshare_rl.continual.config import (
    ContinualConfig,
    TaskIds,
    train_config,
)
from varshare_rl.continual.evaluation import SEED_STEP, Evaluator, visited
from varshare_rl.continual.parts import (
    SequenceTask,
    all_pretrained,
    check_spaces,
    named_apart,
    new_places,
    old_normalizers,
    old_places,
    pooled_normalizer,
    probe,
)
from varshare_rl.continual.results import Progress, document, measure, read_curve
from varshare_rl.data.normalizers import ObservationNormalizer
from varshare_rl.errors import UserError
from varshare_rl.files import write_json
from varshare_rl.run.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from varshare_rl.run.console import Console
from varshare_rl.run.process import seed_everything
from varshare_rl.run.tracker import Tracker
from varshare_rl.transfer.method import state_copy
from varshare_rl.transfer.networks import AgentNetworks, CriticCarry
from varshare_rl.types import Tree

TASKS_FOLDER = "tasks"


class SequenceRun:
    """Learns the tasks in turn and evaluates all of them after each.

    Args:
        config: checked.
        run_dir: its folder.
        agent: what it goes on from, or None.
    """

    def __init__(self, config: ContinualConfig, run_dir: Path, agent: TrainedAgent | None) -> None:
        self.config, self.run_dir = config, run_dir
        self.device = choose_device(config.device)
        old, new = old_places(agent), new_places(config)
        self.old_tasks, self.places = len(old), old + named_apart(old, new)
        self.transitions_per_task = config.total_transitions // len(new)
        if self.transitions_per_task < 1:
            raise UserError(
                f"total_transitions is {config.total_transitions} for {len(new)} tasks; give at least one for each"
            )
        prepare_process(config.seed, config.matmul_precision)
        first = new[0]
        assert first.alone is not None
        if agent is not None:
            check_spaces(config, agent, first.suite)
        self.actor, shapes = probe(train_config(config, env=first.env), first.alone, self.device)
        self.networks = AgentNetworks(
            shapes,
            config.method.build,
            config.carry.critic,
            {} if agent is None else all_pretrained(agent, config.carry.critic),
        )
        self.progress = Progress(normalizers=[] if agent is None else old_normalizers(agent))
        self.evaluator = Evaluator(
            config, self.places, self.networks, self.actor, self.progress.normalizers, self.device
        )
        self.console = Console(config.total_transitions, quiet=config.log.quiet)
        self.started = self.task_started = time.monotonic()  # as if nothing had come between

    @property
    def learnt(self) -> int:
        """Tasks learnt by now, those before the sequence among them."""
        return self.old_tasks + len(self.progress.costs)

    def learn(self) -> None:
        """Go through the tasks that are left, and write the summary.

        Raises:
            Interrupted: a signal came; everything has been saved.
        """
        self.started = time.monotonic() - self.progress.seconds
        done = len(self.progress.costs) * self.transitions_per_task
        resumed = bool(self.progress.rows)
        self.tracker = Tracker(self.run_dir, done if resumed else None, self.progress.seconds)
        try:
            if not self.progress.rows:
                self._evaluate()
                self._save()
            while self.learnt < len(self.places):
                folder = self._folder(self.learnt)
                self._learn_task(self.learnt, folder)
                self._evaluate()
                self._save()
                self._report(folder)
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # not before all of it is in another
        finally:
            self.tracker.close()
            self.evaluator.close()
        write_json(
            self.run_dir / "summary.json", document(self.config, self.places, self.progress, self.provenance())
        )
        self.console.message(f"done: {self.run_dir / 'summary.json'}")

    def provenance(self) -> dict[str, Any]:
        """The conditions of its results."""
        return run_provenance(train_config(self.config), self.places[-1].suite, self.device)

    def _report(self, folder: Path) -> None:
        """Write what the method says of what it keeps, such as Share's errors by layer and task."""
        rows = self.networks.method.report
        if rows:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "report.json", {"rows": rows})
            worst = max(rows, key=lambda row: float(row["error"]))
            self.console.message(
                f"basis of {rows[0]['merges']} merges: largest error {worst['error']:.2g} "
                f"(task {self.places[worst['task']].name}, {worst['layer']}); all in {folder / 'report.json'}"
            )

    def _folder(self, number: int) -> Path:
        name = f"{number - self.old_tasks:02d}_{self.places[number].name.replace(' ', '_')}"
        return self.run_dir / TASKS_FOLDER / name

    def _learn_task(self, number: int, folder: Path) -> None:
        """Train on one task and take what it leaves behind."""
        place = self.places[number]
        position = number - self.old_tasks
        self.task_started = time.monotonic()
        similar = self.evaluator.most_similar(place, self.learnt) if self._wants_similar() else None
        config = train_config(
            self.config,
            env=place.env,
            seed=(self.config.seed + SEED_STEP * position) % 2**32,
            total_transitions=self.transitions_per_task,
        )
        seed_everything(config.seed)
        self.networks.begin(number, similar)
        cost: dict[str, Any] = {"trained_parameters": self.networks.trained_parameters(), "transitions": 0}
        self.console.message(
            f"task {position + 1} of {len(self.places) - self.old_tasks}: {place.name}, "
            f"{cost['trained_parameters']:,} parameters of the policy learn"
        )
        curve: dict[str, list[float]] = {"transitions": [], "success": []}
        if self.networks.trainable():
            cost["transitions"] = self._train(place, config, folder, similar, curve)
        else:
            curve = {"transitions": [0.0], "success": [self._score(self.progress.rows[-1], number)]}
            self.networks.skip()
            self.progress.normalizers.append(self._inherited_normalizer(similar))
        self.progress.curves.append(curve)
        stored = self.networks.stored()
        cost["stored_bytes"] = {"shared": stored.shared, "tasks": stored.tasks, "memory": stored.memory}
        cost["seconds"] = round(time.monotonic() - self.task_started, 3)
        self.progress.costs.append(cost)

    def _train(
        self,
        place: SequenceTask,
        config: TrainConfig,
        folder: Path,
        similar: int | None,
        curve: dict[str, list[float]],
    ) -> int:
        """Run the loop on one task, or its rest, and let the methods take what it leaves; returns its transitions.

        Raises:
            Interrupted: a signal came; the state has been saved.
        """
        assert place.alone is not None
        state = self._unfinished(folder)
        resumed_at, seconds = (None, 0.0) if state is None else (state["transitions"], state["seconds"])
        self.task_started -= seconds  # that it has taken before it was interrupted,
        self.started -= seconds  # which no checkpoint of the sequence knows of
        run = build_run(config, place.alone, folder, resumed_at, seconds, self.networks)
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
        read_curve(folder, f"eval/mean_{measure(self.places)}", curve)
        self.networks.end(obs, action)
        self.progress.normalizers.append(state_copy(agent.normalizer))
        self.progress.carried = self._taken_over(agent)
        return run.transitions

    def _unfinished(self, folder: Path) -> Tree | None:
        """The state of a task that was interrupted; what cannot be gone on with is removed."""
        if not list((folder / "checkpoints").glob("last-*")):  # a best one alone is not enough to go on
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return load_checkpoint(find_checkpoint(folder))

    def _inherited_normalizer(self, similar: int | None) -> dict[str, Tensor]:
        """Statistics of observations that a new task starts from: those of the similar task, or of the last one.

        After an agent of several tasks they are those of all of them together.
        """
        known = self.progress.normalizers
        if similar is not None:
            return known[similar]
        if not known:
            size = self.networks.shapes["actor"][0].in_features
            return state_copy(ObservationNormalizer(1, size, enabled=True))
        return pooled_normalizer(known) if self.learnt == self.old_tasks else known[-1]

    def _hand_over(self, agent: ActorCritic, similar: int | None) -> None:
        """Give the new task's training what it takes over from the last one's."""
        agent.normalizer.load_state_dict(self._inherited_normalizer(similar))
        carried = self.progress.carried
        if carried is None:
            return
        if self.config.carry.critic is CriticCarry.finetune:
            agent.take_over_critic(carried["critic"])
        if self.config.carry.optimizer:
            agent.actor_step.load_state(carried["actor_step"])
        if self.config.carry.replay:
            cast(Any, agent).replay.load_state(carried["replay"])

    def _taken_over(self, agent: ActorCritic) -> Tree:
        """What a next task's training may take over: heads and units of the critic, and what ``carry`` names."""
        critic = state_copy(agent.critic)
        carried: Tree = {"critic": {key: critic[key] for key in critic if not key.startswith("network")}}
        if self.config.carry.optimizer:
            carried["actor_step"] = agent.actor_step.state()
        if self.config.carry.replay:
            carried["replay"] = cast(Any, agent).replay.state()
        return carried

    def _score(self, row: Mapping[str, list[float | None]], number: int) -> float:
        value = row[measure(self.places)][number]
        assert value is not None
        return value

    def _evaluate(self) -> None:
        """Evaluate all tasks and note the row."""
        learnt = self.learnt
        acting = self.evaluator.acting(learnt)
        played = self.evaluator.play(acting, self.config.evaluate.episodes)
        row = {name: [result[name] for result in played] for name in ("success", "return")}
        if self.config.task_ids is TaskIds.hidden:
            row["acted_as"] = [None if task is None else float(task) for task in acting]
        self.progress.rows.append(row)
        names = [place.name for place in self.places]
        done = len(self.progress.costs) * self.transitions_per_task
        scores = [self._score(row, number) for number in range(len(names))]
        metrics = {f"continual/{name}": score for name, score in zip(names, scores, strict=True)}
        seen = scores[:learnt] or scores
        self.tracker.log(metrics | {"continual/mean_of_learnt": sum(seen) / len(seen)}, done)
        self.console.table(f"all tasks after {learnt - self.old_tasks}", dict(zip(names, played, strict=True)))

    def _wants_similar(self) -> bool:
        start = getattr(self.config.method, "start", None)
        return getattr(start, "value", None) == "similar" and self.learnt > 0

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self.started
        done = len(self.progress.costs) * self.transitions_per_task
        tree: Tree = {"progress": vars(self.progress), "governor": self.networks.state()}
        save_checkpoint(self.run_dir, "last", done, tree)

    def load(self) -> Path:
        """Put back the newest checkpoint of the folder, and say which it was."""
        checkpoint = find_checkpoint(self.run_dir)
        tree = load_checkpoint(checkpoint)
        self.progress = Progress(**tree["progress"])
        self.evaluator.normalizers = self.progress.normalizers
        self.networks.load_state(tree["governor"])
        return checkpoint
