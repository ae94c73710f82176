"""Evaluation of all tasks of a sequence, each with the policy that it is acted with by now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from varshare_rl.algorithms.actor_critic import ActorCritic, ActorPolicy
from varshare_rl.algorithms.base import EvaluationPolicy
from varshare_rl.continual.config import ContinualConfig, TaskIds
from varshare_rl.continual.results import Progress
from varshare_rl.continual.tasks import SequenceTask
from varshare_rl.data.normalizers import ObservationNormalizer
from varshare_rl.envs.suite import VectorEngine
from varshare_rl.nn.actor import Actor, GaussianActor
from varshare_rl.nn.weight_sampler import Resample
from varshare_rl.run.evaluation import EpisodeCursor, PerTaskPolicies, play
from varshare_rl.run.process import own_random
from varshare_rl.transfer.networks import AgentNetworks
from varshare_rl.transfer.share.selection import ReturnBandit

#: Between seeds that must not meet.
SEED_STEP = 10_007

#: Means over a task's episodes, as :class:`varshare_rl.run.evaluation.Evaluation` has them.
Result = dict[str, float | None]


class Evaluator:
    """Plays the tasks of a sequence with the policies of learnt ones.

    Args:
        config: of the run.
        tasks: all of the sequence.
        networks: of the agent; actor: a policy of the kind that the algorithm makes.
        progress: has what belongs to every learnt task's policy besides the network; it grows.
        device: where to compute.
    """

    def __init__(
        self,
        config: ContinualConfig,
        tasks: Sequence[SequenceTask],
        networks: AgentNetworks,
        actor: Actor,
        progress: Progress,
        device: torch.device,
    ) -> None:
        self.config, self.tasks, self.device = config, tasks, device
        self.networks, self.actor, self.progress = networks, actor, progress
        self._tables = tables(tasks)
        self._engines: dict[tuple[int, int, bool], VectorEngine] = {}

    def with_seed(self, seed: int) -> Evaluator:
        """Return the same with episodes from other starts."""
        config = replace(self.config, seed=seed)
        return Evaluator(config, self.tasks, self.networks, self.actor, self.progress, self.device)

    def close(self) -> None:
        """Free the engines."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def play(
        self,
        acting: Sequence[int | None],
        episodes: int,
        other_starts: bool = False,
        cursors: Sequence[EpisodeCursor] | None = None,
        meanwhile: bool = False,
    ) -> list[Result]:
        """Play episodes of every task with the policies of the given learnt tasks; None: an untrained one.

        ``meanwhile``: while the next task is being learnt.

        With ``other_starts`` they start where the episodes of evaluations never do. They are always the same ones,
        but with ``cursors``, one per table, which they go on from.
        """
        results: list[Result] = [{} for _ in self.tasks]
        for index, table in enumerate(self._tables):
            suite = self.tasks[table[0]].suite
            makers = [self._policy(self.tasks[number], acting[number], meanwhile) for number in table]
            engine = self._engine(suite, min(episodes, self.config.env.envs_per_task), other_starts)
            cursor = None if cursors is None else cursors[index]
            played = play(partial(PerTaskPolicies, makers), suite, engine, episodes, self.device, cursor)
            for number, result in zip(table, played.values(), strict=True):
                results[number] = result
        return results

    def acting(self, learnt: int) -> list[int | None]:
        """Return for every task the learnt one whose policy acts there; None: an untrained one.

        So many are ``learnt``; the others are acted with the last learnt one's policy. With hidden ids the choice
        is that of :meth:`select`, or the last task's where all have one network.
        """
        count = len(self.tasks)
        if self.config.task_ids is TaskIds.hidden and learnt > 1:
            if self.networks.method.task_free:  # all that differs are the statistics: the latest for all
                return [learnt - 1] * count
            return list(self.select(learnt))
        return [min(number, learnt - 1) if learnt else None for number in range(count)]

    def select(self, learnt: int) -> list[int]:
        """Find for every task the learnt one whose policy earns the most there, by a bandit over episodes."""
        envs = self.config.env.envs_per_task
        bandits = [ReturnBandit(learnt) for _ in self.tasks]
        cursors = [EpisodeCursor() for _ in self._tables]
        for _ in range(max(learnt, self.config.selection_episodes // envs)):
            arms = [bandit.choose() for bandit in bandits]
            played = self.play(arms, envs, other_starts=True, cursors=cursors)
            for bandit, arm, result in zip(bandits, arms, played, strict=True):
                bandit.update(arm, _earned(result))
        return [bandit.best for bandit in bandits]

    def most_similar(self, task: SequenceTask, learnt: int) -> int:
        """Find the learnt task whose policy earns the most in a new one, on episodes that evaluations never see."""
        suite, episodes = task.alone, self.config.similar_episodes
        assert suite is not None
        engine = self._engine(suite, min(episodes, self.config.env.envs_per_task), other_starts=True)
        earned = []
        for candidate in range(learnt):
            policy = partial(PerTaskPolicies, [self._policy(task, candidate)])
            (result,) = play(policy, suite, engine, episodes, self.device).values()
            earned.append(_earned(result))
        return max(range(learnt), key=earned.__getitem__)

    def policy(
        self, task: SequenceTask, learnt: int | None, meanwhile: bool = False
    ) -> tuple[Actor, ObservationNormalizer]:
        """Return the policy of a learnt task with the actions of ``task``, and its statistics; None: untrained.

        ``meanwhile``: while the next task is being learnt.
        """
        if learnt is None:
            network = self.networks.method.base_network().requires_grad_(False).eval()
        else:
            network = self.networks.policy(learnt, meanwhile)
        mask = torch.from_numpy(task.suite.action_mask[task.index : task.index + 1])
        actor = self.actor.with_network(network, mask)
        if learnt is not None and isinstance(actor, GaussianActor) and actor.log_stds is not None:
            actor.log_stds = nn.Parameter(self.progress.log_stds[learnt], requires_grad=False)
        actor.to(self.device)
        size = self.networks.specs["actor"][0].in_features
        options = self.config.algorithm
        normalizer = ObservationNormalizer(1, size, options.normalize_observations, options.min_observation_std)
        normalizer.to(self.device)
        if learnt is not None:
            normalizer.load_state_dict(self.progress.normalizers[learnt])
        return actor, normalizer

    def _policy(
        self, task: SequenceTask, learnt: int | None, meanwhile: bool = False
    ) -> Callable[[int], EvaluationPolicy]:
        return partial(ActorPolicy, *self.policy(task, learnt, meanwhile), Resample.mean, 1)

    def _engine(self, suite: Any, envs: int, other_starts: bool) -> VectorEngine:
        key = (id(suite), envs, other_starts)
        if key not in self._engines:
            seed = (self.config.seed + SEED_STEP * other_starts) % 2**32
            with own_random():
                self._engines[key] = suite.make_engine(envs, seed, evaluation=True)
        return self._engines[key]


def tables(tasks: Sequence[SequenceTask]) -> list[list[int]]:
    """Return the numbers of tasks that can be played at once: all of one suite, in its order.

    Every suite's tasks fill whole tables: one that comes round again is in the next.
    """
    found: dict[tuple[int, int], list[int]] = {}
    seen: dict[tuple[int, int], int] = {}
    for number, task in enumerate(tasks):
        key = (id(task.suite), task.index)
        seen[key] = seen.get(key, -1) + 1
        found.setdefault((id(task.suite), seen[key]), []).append(number)
    return [sorted(table, key=lambda number: tasks[number].index) for table in found.values()]


def _earned(result: Result) -> float:
    earned = result["return"]
    assert earned is not None
    return earned


@torch.no_grad()
def visited(agent: ActorCritic, engine: VectorEngine, transitions: int) -> tuple[Tensor, Tensor]:
    """Collect normalised observations ``[1, N, F]`` that an exploring policy of one task meets, and its actions.

    Actions are ``[1, N, A]``, or ``[1, N]`` choices. Where ``N`` is less than the environments' steps of one
    episode, it is a sample of them, evenly spread, so that the ends of episodes are in it.
    """
    found: list[tuple[Tensor, Tensor]] = []
    device = next(agent.actor.parameters()).device
    obs = torch.from_numpy(engine.reset()).to(device)
    wanted = -(-transitions // obs.shape[1])
    steps = max(wanted, agent.spec.horizon)
    kept = {round(k * steps / wanted) for k in range(wanted)}
    for k in range(steps):
        normal = agent.normalizer(obs)
        with agent.weight_sampler.sample(obs.shape[1]):
            action: Tensor = agent.actor(normal, agent.task_ids).sample().action
        if k in kept:
            found.append((normal, action))
        step = engine.step(action.cpu().numpy())
        agent.weight_sampler.record(torch.from_numpy(step.terminated | step.truncated))
        obs = torch.from_numpy(step.obs).to(device)
    obs, action = (torch.cat(part, dim=1)[:, :transitions] for part in zip(*found, strict=True))
    return obs, action
