"""The loop: act, step, store, update, log, evaluate, save. One for all algorithms and suites."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from varshare_rl.algorithms.base import Algorithm
from varshare_rl.data.episodes import EpisodeStatistics
from varshare_rl.envs.engine import cut_off, leave_out
from varshare_rl.envs.suite import Step, Suite, VectorEngine
from varshare_rl.errors import EpisodePlace, RunFailure
from varshare_rl.files import Patience
from varshare_rl.ranks import ALONE, Ranks
from varshare_rl.run.callbacks import Callbacks, is_false
from varshare_rl.run.checkpoint import fitting, has_later, save_checkpoint
from varshare_rl.run.console import Console, counted
from varshare_rl.run.evaluation import Evaluation, EvaluationStopped, evaluate, layer_kl, shown
from varshare_rl.run.loop_config import LoopConfig, OnDivergence
from varshare_rl.run.phases import PhaseClock
from varshare_rl.run.process import (
    compute_threads,
    keep_freed_memory,
    load_rng_state,
    one_thread,
    own_random,
    rng_state,
)
from varshare_rl.run.ranked_engine import make_engine
from varshare_rl.run.sharing_monitor import SharingMonitor
from varshare_rl.run.signals import Interrupted, answering
from varshare_rl.run.tracker import Tracker
from varshare_rl.state import Stateful
from varshare_rl.types import Metrics, Scalars, Transition, Tree

#: Updates in a row without a loss to learn from after which a run is given up.
MOST_IDLE_STEPS = 1000


class Diverged(RunFailure):
    """Losses are not finite any more. The message names tasks and transitions."""


@dataclass
class Run(Stateful):
    """A training run: its parts, and how far it has come."""

    state_fields = (
        "best_score", "evaluated_at", "observed_at?", "phase_seconds", "masked_tasks", "not_finite?", "algorithm",
        "episodes",
    )  # fmt: skip

    suite: Suite
    provenance: dict[str, Any]
    engine: VectorEngine
    algorithm: Algorithm
    tracker: Tracker
    sharing_monitor: SharingMonitor
    console: Console
    run_dir: Path
    seed: int
    device: torch.device
    config: LoopConfig
    options: dict[str, bool | int | float | str] = field(default_factory=dict)  # of the run, for its checkpoints
    transitions: int = 0
    observed_at: int = 0
    best_score: tuple[float, ...] | None = None  # of Evaluation.score
    evaluation: Evaluation | None = None
    evaluated_at: int = -1
    scalars: Scalars = field(default_factory=dict)
    clock: PhaseClock = field(default_factory=PhaseClock)
    masked_tasks: set[str] = field(default_factory=set)  # that the screen has named
    also_evaluate: Callable[[int], Metrics] | None = None  # what else is measured then, after so many transitions
    not_finite: dict[str, int] = field(default_factory=dict)  # observations and rewards, by task
    callbacks: Callbacks = field(default_factory=Callbacks)
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.episodes = EpisodeStatistics(
            self.suite.task_names, self.engine.envs_per_task, staggered=self.suite.staggered
        )
        self.evaluation_engine: VectorEngine | None = None
        half = self.engine.envs_per_task // 2
        # Acting in two turns lets the workers step the first half while the policy acts for the second.
        self._turns = [slice(0, half), slice(half, None)] if self.config.overlap and half else [slice(None)]
        self._room = Patience(
            self.config.checkpoint_wait_minutes, self.console.message, lambda: bool(self.ranks.said("signal"))
        )
        self._saved_at, self._save_seconds = time.monotonic(), 0.0
        self._resumed_at = -1
        self._masked_before: dict[str, int] = {}  # steps, by a run that masked and goes on otherwise

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Time by phase, with that before a resume."""
        return self.clock.seconds

    @phase_seconds.setter
    def phase_seconds(self, seconds: dict[str, float]) -> None:
        self.clock.seconds = seconds

    def train(self) -> Evaluation:
        """Run to the end and return the last evaluation.

        Raises:
            Interrupted: a signal came; the state has been saved.
        """
        keep_freed_memory()
        threads = compute_threads(self.provenance["threads"])
        with self.console, self._interruptible(), threads, self.clock("rest"):
            for remark in self.suite.remarks():
                self.console.message(remark)
            obs = self._to_device(self._observation)
            if self._evaluate_if_due():  # before the first step, or what a signal has cut short
                self.save("last")
            self._stop_if_interrupted()
            self.console.progress(self.transitions, {})
            while self.transitions < self.config.total_transitions and not self.ranks.heard("end"):
                obs = self._vector_step(obs)
                self.algorithm.advance(self.transitions / self.config.total_transitions)
                updates = self.algorithm.updates
                while self.algorithm.ready():
                    self._update()
                self.console.progress(self.transitions, updated=self.algorithm.updates > updates)
                self._after_step()
                self._stop_if_interrupted()
            if self.evaluated_at != self.transitions:
                self._evaluate()
            self.save("last")
            self._stop_if_interrupted()  # during the last evaluation; resuming writes the summary
        assert self.evaluation is not None
        return self.evaluation

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Say signals to stop to all ranks instead of dying."""
        try:
            with answering(lambda number: self.ranks.say("signal", self.ranks.said("signal") or number), each=True):
                yield
        finally:
            self.ranks.silence()

    def start(self, evaluate: bool = False) -> None:
        """Reset the environments and save a first checkpoint; for a new run. ``evaluate`` does so before."""
        if evaluate:
            self._evaluate()
        self._observation = self.engine.reset()
        self.save("last")

    def branch(self, state: Tree) -> None:
        """Begin with a checkpoint of another run: evaluate, and save a first one; for a new run."""
        self.load_state(state)
        self.algorithm.branch(self.transitions / self.config.total_transitions)
        self.best_score, self.evaluated_at = None, -1
        if self.config.evaluate_every:
            self._evaluate()
        self.save("last")

    def close(self) -> None:
        """Free engines and close the logs."""
        self.engine.close()
        if self.evaluation_engine is not None:
            self.evaluation_engine.close()
        self.tracker.close()

    def _vector_step(self, obs: torch.Tensor) -> torch.Tensor:
        actions = []
        for envs in self._turns:
            with self.clock("act"), one_thread():
                actions.append(self.algorithm.act(obs[:, envs]))
                host_action = actions[-1].cpu().numpy()
            with self.clock("engine"):
                self.engine.begin(host_action, envs)
        with self.clock("engine"):
            step = self.engine.finish()
        self._count_not_finite(step)
        action = actions[0] if len(actions) == 1 else torch.cat(actions, dim=1)
        self.episodes.add(step.reward, step.success, step.terminated | step.truncated)
        tensors = (step.reward, step.terminated, step.truncated, step.next_obs)
        with self.clock("observe"), one_thread():
            self.algorithm.observe(Transition(obs, action, *(self._to_device(x) for x in tensors)))
        self.transitions += step.reward.size
        return self._to_device(step.obs)

    def _count_not_finite(self, step: Step) -> None:
        """Count what is NaN or infinite, and name a task where it begins; statistics and updates leave it out."""
        good = np.isfinite(step.reward) & np.isfinite(step.next_obs).all(-1) & np.isfinite(step.obs).all(-1)
        if good.all():
            return
        for index in np.flatnonzero(~good.all(1)):
            task = self.suite.task_names[index]
            if task not in self.not_finite:
                self.console.message(
                    f"warning: after {self.transitions:,} transitions task {task} gave an observation or a reward "
                    f"that is NaN or infinite; such are left out and counted as not_finite/{task}"
                )
            self.not_finite[task] = self.not_finite.get(task, 0) + int((~good[index]).sum())

    def _update(self) -> None:
        """Make one update, and observe the networks after the first one that falls due."""
        every = self.config.observe_every
        due = every > 0 and self.transitions // every > self.observed_at // every
        if due:
            self.algorithm.measure_conflict()
        with self.clock("update"):
            self.scalars = self.algorithm.update()
        self._check_divergence()
        if due:
            self.observed_at = self.transitions
        if due and self.ranks.first:
            with self.clock("sharing"):
                self._room.for_logs(self.run_dir)
                self.sharing_monitor.observe(self.algorithm, self.transitions)

    def _check_divergence(self) -> None:
        """Raise Diverged where the run is to stop for it, or where nothing has been learnt for long."""
        if self.algorithm.idle_steps() >= MOST_IDLE_STEPS:
            raise Diverged(
                f"after {self.transitions:,} transitions no task has had a finite loss for {MOST_IDLE_STEPS} steps "
                "in a row; use a lower learning rate, or on_divergence=rollback"
            )
        if self.config.on_divergence is OnDivergence.mask:
            return
        masked = self.algorithm.masked_steps().tolist()
        tasks = [
            task
            for task, steps in zip(self.suite.task_names, masked, strict=True)
            if steps > self._masked_before.get(task, 0)
        ]
        if tasks:
            raise Diverged(
                f"after {self.transitions:,} transitions the loss of {', '.join(tasks[:5])} is not finite, or its "
                "gradient"
            )

    def _after_step(self) -> None:
        """Log, evaluate and save where their counts have come round."""
        if self._due(self.config.log_every) and self.ranks.first:
            self._log()
        self._evaluate_if_due()
        self.ranks.say("save", self.ranks.first and self._due_by_time())
        if self._due(self.config.checkpoint_every) or self.ranks.heard("save"):
            self.save("last")
            self.ranks.say("save", False)

    def _due(self, every: int) -> bool:
        before = self.transitions - self.engine.num_tasks * self.engine.envs_per_task
        return every > 0 and self.transitions // every > max(before, 0) // every

    def _due_by_time(self) -> bool:
        """Return True after ``checkpoint_minutes``, but spend no more than a twentieth of the time on saving."""
        wait = max(60.0 * self.config.checkpoint_minutes, 20.0 * self._save_seconds)
        return self.config.checkpoint_minutes > 0 and time.monotonic() - self._saved_at >= wait

    def _evaluate_if_due(self) -> bool:
        every = self.config.evaluate_every
        due = self._due(every) or (self.transitions == 0 and every > 0)
        if not due or self.evaluated_at == self.transitions:
            return False
        self._evaluate()
        return self.evaluated_at == self.transitions

    def _stop_if_interrupted(self) -> None:
        """Save and raise Interrupted if a signal has come."""
        if self.ranks.heard("signal"):
            self.save("last")
            raise Interrupted(self.ranks.heard("signal"))

    def _log(self) -> None:
        with self.clock("log"):
            metrics = read_scalars(self.scalars, self.suite.task_names)
            metrics |= self.episodes.metrics(self.suite.has_success)
            metrics |= self._kl()
            metrics |= self.algorithm.metrics()
            metrics |= self._masked()
            metrics |= {f"not_finite/{task}": float(count) for task, count in self.not_finite.items()}
            metrics["time/transitions_per_second"] = self.console.transitions_per_second
            metrics["time/updates"] = float(self.algorithm.updates)
            metrics |= {f"time/share_{phase}": share for phase, share in self.clock.shares().items()}
            self._room.for_logs(self.run_dir)
            self.tracker.log(metrics, self.transitions)
            self.console.progress(self.transitions, self._headline(metrics), updated=False)
            if self.callbacks.on_log is not None and is_false(self.callbacks.on_log(self.transitions, metrics)):
                self.ranks.say("end", True)

    def _kl(self) -> Metrics:
        """``kl/<task>`` over all layers and ``kl_layer/<layer>``, the mean over tasks; none without posteriors."""
        layers = layer_kl(self.algorithm.trained_modules())
        metrics = {f"kl_layer/{layer}": float(nats.mean()) for layer, nats in layers.items()}
        for index, task in enumerate(self.suite.task_names if layers else ()):
            metrics[f"kl/{task}"] = float(sum(nats[index] for nats in layers.values()))
        return metrics

    def _masked(self) -> Metrics:
        """``divergence_guard/<task>``: steps that a task was left out of, if any; says so when it begins."""
        metrics: Metrics = {}
        for task, steps in zip(self.suite.task_names, self.algorithm.masked_steps().tolist(), strict=True):
            if steps == 0:
                continue
            metrics[f"divergence_guard/{task}"] = float(steps)
            if task not in self.masked_tasks:
                self.masked_tasks.add(task)
                self.console.message(
                    f"warning: by {self.transitions:,} transitions the loss of task {task} has diverged; "
                    f"such steps go on without it and are counted as divergence_guard/{task}"
                )
        return metrics

    def _headline(self, metrics: Metrics) -> Metrics:
        name = "train/mean_success" if self.suite.has_success else "train/mean_return"
        return {name.removeprefix("train/mean_"): metrics[name]} if name in metrics else {}

    def _evaluate(self) -> None:
        episodes, stop = self.config.evaluate_episodes, lambda: bool(self.ranks.heard("signal"))
        try:
            with self.clock("evaluate"), own_random(self.seed):
                if self.evaluation_engine is None:
                    envs = min(episodes, self.engine.envs_per_task)
                    self.evaluation_engine = make_engine(
                        self.suite, envs, self.seed, True, self.ranks, self.config.tasks_per_rank
                    )
                result = evaluate(self.algorithm, self.suite, self.evaluation_engine, episodes, stop)
        except EvaluationStopped:  # the run is about to end, and evaluates when it goes on
            return
        self.evaluation, self.evaluated_at = result, self.transitions
        also = {} if self.also_evaluate is None else self.also_evaluate(self.transitions)
        if not self.tracker.evaluated or self.transitions != self._resumed_at:  # else it was logged and not saved
            self._room.for_logs(self.run_dir)
            self.tracker.log(result.metrics() | also, self.transitions)
        self.console.table(f"evaluation at {counted(self.transitions, 'transition')}", shown(result.tasks))
        if self.best_score is None or result.score > self.best_score:
            self.best_score = result.score
            self.save("best")
        told = self.callbacks.on_evaluate if self.ranks.first else None
        if told is not None and is_false(told(self.transitions, result)):
            self.ranks.say("end", True)

    def save(self, kind: str) -> Path:
        """Write a checkpoint: ``last`` holds everything needed to go on, ``best`` the policy."""
        with self.clock("save"):
            began = time.monotonic()
            keep = self.config.checkpoint_keep if kind == "last" else 1
            path = save_checkpoint(
                self.run_dir, kind, self.transitions, self._tree(kind), keep, self.ranks, self._room
            )
            if kind == "last":
                self._saved_at = time.monotonic()
                self._save_seconds = self._saved_at - began
        if self.callbacks.on_checkpoint is not None and self.ranks.first:
            self.callbacks.on_checkpoint(self.transitions, path)
        return path

    def _tree(self, kind: str) -> Tree:
        """Return what a checkpoint of a kind holds: all of it on the first rank, on others what is their own."""
        if kind == "last":
            networks = [module.parameters() for module in self.algorithm.trained_modules().values()]
            self.ranks.require_same(list(chain(*networks)), f"a network, after {self.transitions:,} transitions,")
        if not self.ranks.first:
            if kind != "last":
                return {}
            return {"engine": self.engine.state(), "algorithm": self.algorithm.own_state()}
        counters: Tree = {
            "transitions": self.transitions,
            "updates": self.algorithm.updates,
            "seconds": self.tracker.seconds,
            "options": self.options,
        }
        if kind != "last":
            return counters | {"algorithm": self.algorithm.policy_state()}
        return counters | ({"ranks": self.ranks.size} if self.ranks.size > 1 else {}) | self.state()

    def state(self) -> Tree:
        """Return everything needed to go on bit for bit, besides the counters."""
        return super().state() | {
            "evaluation": None if self.evaluation is None else self.evaluation.tasks,
            "scalars": read_scalars(self.scalars, self.suite.task_names),
            "engine": self.engine.state(),
            "random": rng_state(),
        }

    def load_state(self, state: Tree, left_out: Sequence[EpisodePlace] = ()) -> None:
        """Put back what :meth:`save` wrote as ``last``.

        ``left_out``: episodes that are passed over from there on, as they fail. One of them that is under way, or
        one of an environment that cannot play it again, is cut off, and counts for no statistics of episodes.
        """
        for episode in left_out:
            leave_out(state["engine"], *episode)
        with fitting(self.run_dir):
            self.transitions = self.observed_at = self._resumed_at = state["transitions"]
            super().load_state(state)
            if self.best_score is not None and len(self.best_score) < 3:  # of former versions: without the tasks
                known = all(math.isfinite(value) for value in self.best_score)
                self.best_score = (float(self.engine.num_tasks), *self.best_score) if known else None
            if self.ranks.from_first(lambda: has_later(self.run_dir, "best", self.transitions)):
                self.best_score = None  # its policy has made way for one from after here, as that will
            self.evaluation = None if state["evaluation"] is None else Evaluation(state["evaluation"])
            self.scalars = state["scalars"]
            self._observation = self.engine.load_state(state["engine"])
            load_rng_state(state["random"])
            grid = np.zeros((self.engine.num_tasks, self.engine.envs_per_task), np.float32)
            for place in cut_off(state["engine"], self.engine.state()):
                grid[place] = 1.0
            ended = self.ranks.unite(torch.from_numpy(grid)).numpy() > 0
            if ended.any():
                self.episodes.forget(ended)
                self.algorithm.end_episodes(self._to_device(ended))
            masked = self.algorithm.masked_steps().tolist()
            self._masked_before = dict(zip(self.suite.task_names, masked, strict=True))

    def _to_device(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def read_scalars(scalars: Scalars, task_names: Sequence[str]) -> Metrics:
    """Return what an update left as numbers, what is ``[T]`` as ``<name>/<task>``."""
    metrics: Metrics = {}
    for name, value in scalars.items():
        if isinstance(value, torch.Tensor) and value.dim():
            each = zip(task_names, value.tolist(), strict=True)
            metrics.update({f"{name}/{task}": number for task, number in each})
        else:
            metrics[name] = float(value)
    return metrics
