"""Evaluating all tasks of a sequence, each with the policy that it is acted with by now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from varshare_rl.algorithms.actor_critic import ActorCritic, GreedyPolicy
from varshare_rl.algorithms.base import EvaluationPolicy
from varshare_rl.continual.config import ContinualConfig, TaskIds
from varshare_rl.continual.parts import SequenceTask
from varshare_rl.data.normalizers import ObservationNormalizer
from varshare_rl.envs.suite import VectorEngine
from varshare_rl.nn.actor import Actor
from varshare_rl.run.evaluation import EpisodeCursor, PerTaskPolicies, play
from varshare_rl.transfer.networks import AgentNetworks
from varshare_rl.transfer.share.selection import ReturnBandit

#: Between seeds that must not meet.
SEED_STEP = 10_007

#: Means over a place's episodes, as :class:`varshare_rl.run.evaluation.Evaluation` has them.
Result = dict[str, float | None]


class Evaluator:
    """Plays the tasks of a sequence with the policies of learnt ones.

    Args:
        config: of the run.
        places: all tasks.
        governor: has the networks; actor: a policy of the kind that the algorithm makes.
        normalizers: statistics of observations of every learnt task; the list grows.
        device: where to compute.
    """

    def __init__(
        self,
        config: ContinualConfig,
        places: Sequence[SequenceTask],
        networks: AgentNetworks,
        actor: Actor,
        normalizers: list[dict[str, Tensor]],
        device: torch.device,
    ) -> None:
        self.config, self.places, self.device = config, places, device
        self.networks, self.actor, self.normalizers = networks, actor, normalizers
        self._tables = tables(places)
        self._engines: dict[tuple[int, int, bool], VectorEngine] = {}

    def with_seed(self, seed: int) -> Evaluator:
        """The same with episodes from other starts."""
        config = replace(self.config, seed=seed)
        return Evaluator(config, self.places, self.networks, self.actor, self.normalizers, self.device)

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
        stages: Sequence[EpisodeCursor] | None = None,
    ) -> list[Result]:
        """Episodes of every place with the policies of the given learnt tasks; None: an untrained one.

        With ``other_starts`` they start where the episodes of evaluations never do. They are always the same ones,
        but with ``stages``, one per table, which they go on from.
        """
        results: list[Result] = [{} for _ in self.places]
        for index, table in enumerate(self._tables):
            suite = self.places[table[0]].suite
            makers = [self._policy(self.places[number], acting[number]) for number in table]
            engine = self._engine(suite, min(episodes, self.config.env.envs_per_task), other_starts)
            stage = None if stages is None else stages[index]
            played = play(partial(PerTaskPolicies, makers), suite, engine, episodes, self.device, stage)
            for number, result in zip(table, played.values(), strict=True):
                results[number] = result
        return results

    def acting(self, learnt: int) -> list[int | None]:
        """For every place the learnt task whose policy acts there when so many are learnt; None: an untrained one.

        Tasks not learnt yet are acted with the last learnt one's policy. With hidden ids the choice is that of
        :meth:`select`, or the last task's where all have one network.
        """
        count = len(self.places)
        if self.config.task_ids is TaskIds.hidden and learnt > 1:
            if self.networks.method.task_free:  # all that differs are the statistics: the latest for all
                return [learnt - 1] * count
            return list(self.select(learnt))
        return [min(number, learnt - 1) if learnt else None for number in range(count)]

    def select(self, learnt: int) -> list[int]:
        """For every place the learnt task whose policy earns the most there, found by a bandit over episodes."""
        envs = self.config.env.envs_per_task
        bandits = [ReturnBandit(learnt) for _ in self.places]
        stages = [EpisodeCursor() for _ in self._tables]
        for _ in range(max(learnt, self.config.selection_episodes // envs)):
            arms = [bandit.choose() for bandit in bandits]
            played = self.play(arms, envs, other_starts=True, stages=stages)
            for bandit, arm, result in zip(bandits, arms, played, strict=True):
                bandit.update(arm, _earned(result))
        return [bandit.best for bandit in bandits]

    def most_similar(self, place: SequenceTask, learnt: int) -> int:
        """The learnt task whose policy earns the most in a new one, on episodes that evaluations never see."""
        suite, episodes = place.alone, self.config.similar_episodes
        assert suite is not None
        engine = self._engine(suite, min(episodes, self.config.env.envs_per_task), other_starts=True)
        earned = []
        for candidate in range(learnt):
            policy = partial(PerTaskPolicies, [self._policy(place, candidate)])
            (result,) = play(policy, suite, engine, episodes, self.device).values()
            earned.append(_earned(result))
        return max(range(learnt), key=earned.__getitem__)

    def policy(self, place: SequenceTask, learnt: int | None) -> tuple[Actor, ObservationNormalizer]:
        """The policy of a learnt task with the actions of a place, and its statistics; None: an untrained one."""
        if learnt is None:
            network = self.networks.method.base_network().requires_grad_(False).eval()
        else:
            network = self.networks.policy(learnt)
        mask = torch.from_numpy(place.suite.action_mask[place.index : place.index + 1])
        actor = self.actor.with_network(network, mask).to(self.device)
        size = self.networks.specs["actor"][0].in_features
        normalizer = ObservationNormalizer(1, size, self.config.algorithm.normalize_observations).to(self.device)
        if learnt is not None:
            normalizer.load_state_dict(self.normalizers[learnt])
        return actor, normalizer

    def _policy(self, place: SequenceTask, learnt: int | None) -> Callable[[int], EvaluationPolicy]:
        return partial(GreedyPolicy, *self.policy(place, learnt), self.config.elbo.draw.evaluation, 1)

    def _engine(self, suite: Any, envs: int, other_starts: bool) -> VectorEngine:
        key = (id(suite), envs, other_starts)
        if key not in self._engines:
            seed = (self.config.seed + SEED_STEP * other_starts) % 2**32
            self._engines[key] = suite.make_engine(envs, seed, evaluation=True)
        return self._engines[key]


def tables(places: Sequence[SequenceTask]) -> list[list[int]]:
    """Numbers of places that can be played at once: all tasks of one suite, in its order.

    Every suite's places fill whole tables: a task that comes round again is in the next one.
    """
    found: dict[tuple[int, int], list[int]] = {}
    seen: dict[tuple[int, int], int] = {}
    for number, place in enumerate(places):
        task = (id(place.suite), place.index)
        seen[task] = seen.get(task, -1) + 1
        found.setdefault((id(place.suite), seen[task]), []).append(number)
    return [sorted(table, key=lambda number: places[number].index) for table in found.values()]


def _earned(result: Result) -> float:
    earned = result["return"]
    assert earned is not None
    return earned


@torch.no_grad()
def visited(agent: ActorCritic, engine: VectorEngine, transitions: int) -> tuple[Tensor, Tensor]:
    """Normalised observations ``[1, N, F]`` that a policy of one task meets when it explores, and its actions.

    Actions are ``[1, N, A]``, or ``[1, N]`` choices.
    """
    found: list[tuple[Tensor, Tensor]] = []
    device = next(agent.actor.parameters()).device
    obs = torch.from_numpy(engine.reset()).to(device)
    for _ in range(-(-transitions // obs.shape[1])):
        normal = agent.normalizer(obs)
        with agent.weight_sampler.sample(obs.shape[1]):
            action: Tensor = agent.actor(normal, agent.task_ids).sample().action
        found.append((normal, action))
        step = engine.step(action.cpu().numpy())
        agent.weight_sampler.record(torch.from_numpy(step.terminated | step.truncated))
        obs = torch.from_numpy(step.obs).to(device)
    obs, action = (torch.cat(part, dim=1)[:, :transitions] for part in zip(*found, strict=True))
    return obs, action
