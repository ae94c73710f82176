"""An engine whose environments are divided over ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from varshare_rl.envs.division import Part, part_of
from varshare_rl.envs.suite import FloatArray, State, Step, Suite, VectorEngine
from varshare_rl.errors import RunFailure, UserError
from varshare_rl.ranks import ALONE, Ranks


def make_engine(
    suite: Suite,
    envs_per_task: int,
    seed: int,
    evaluation: bool = False,
    ranks: Ranks = ALONE,
    tasks_per_rank: int | None = None,
) -> VectorEngine:
    """Make the engine of a suite; with several ranks each has a part of its slots, see :func:`part_of`.

    Raises:
        UserError: the slots cannot be divided, or the suite cannot make a part of its engine.
    """
    if ranks.size == 1:
        return suite.make_engine(envs_per_task, seed, evaluation)
    if "part" not in inspect.signature(suite.make_engine).parameters:
        raise UserError(
            f"make_engine of env={suite.name} takes no part, as several ranks need; run it in one process"
        )
    parts = [
        part_of(n, ranks.size, len(suite.task_names), envs_per_task, tasks_per_rank) for n in range(ranks.size)
    ]
    if not evaluation and not all(part.envs for part in parts):
        raise UserError(
            f"{ranks.size} ranks cannot divide env.envs_per_task={envs_per_task}; give more, or tasks_per_rank"
        )
    part = parts[ranks.rank]

    def make() -> VectorEngine | None:
        return suite.make_engine(envs_per_task, seed, evaluation, part) if part.envs else None

    sizes = (len(suite.task_names), envs_per_task, suite.observation_space.shape[0])
    return RankedEngine(ranks.together(make), part, ranks, sizes)


class RankedEngine(VectorEngine):
    """All slots, of which each rank steps a part: what happens in the others it hears from their ranks.

    A failure on one rank is raised on all of them.

    Args:
        own: engine of this rank's part; None where that is empty.
        part: its slots.
        ranks: all that have a part.
        sizes: ``T, E, F`` of the whole.
    """

    def __init__(self, own: VectorEngine | None, part: Part, ranks: Ranks, sizes: tuple[int, int, int]) -> None:
        self.own, self.part, self.ranks = own, part, ranks
        self.num_tasks, self.envs_per_task, self.obs_size = sizes
        self._slots = np.ix_(part.tasks, part.envs)
        self._failure: RunFailure | UserError | None = None

    def reset(self) -> FloatArray:
        """See ``VectorEngine.reset``."""
        return self._whole(self.ranks.together(lambda: None if self.own is None else self.own.reset()))

    def step(self, actions: npt.NDArray[Any]) -> Step:
        """See ``VectorEngine.step``."""
        self.begin(actions, slice(None))
        return self.finish()

    def begin(self, actions: npt.NDArray[Any], envs: slice) -> None:
        """See ``VectorEngine.begin``."""
        first, last, _ = envs.indices(self.envs_per_task)
        chosen = [(here, e) for here, e in enumerate(self.part.envs) if first <= e < last]
        if self.own is None or not chosen:
            return
        here, there = slice(chosen[0][0], chosen[-1][0] + 1), [e - first for _, e in chosen]
        own, actions = self.own, actions[np.ix_(self.part.tasks, there)]
        self._attempt(lambda: own.begin(actions, here))

    def finish(self) -> Step:
        """See ``VectorEngine.finish``."""
        step = None if self.own is None else self._attempt(self.own.finish)
        rows = np.zeros((self.num_tasks, self.envs_per_task, 2 * self.obs_size + 4), np.float32)
        if step is not None:
            flags = (step.reward, step.terminated, step.truncated, step.success)
            parts = (step.obs, step.next_obs, *(flag[..., None] for flag in flags))
            rows[self._slots] = np.concatenate(parts, axis=-1, dtype=np.float32)
        self.ranks.say("failed", self._failure is not None)
        rows = self.ranks.exchange(torch.from_numpy(rows)).numpy()
        if self.ranks.heard("failed"):
            self.ranks.together(self._fail)
        task_id = np.repeat(np.arange(self.num_tasks, dtype=np.int64)[:, None], self.envs_per_task, axis=1)
        return Step(
            obs=rows[..., : self.obs_size].copy(),
            next_obs=rows[..., self.obs_size : -4].copy(),
            reward=rows[..., -4].copy(),
            terminated=rows[..., -3] > 0,
            truncated=rows[..., -2] > 0,
            success=rows[..., -1] > 0,
            task_id=task_id,
        )

    def state(self) -> State:
        """Return the state of this rank's part."""
        return self.ranks.together(lambda: {} if self.own is None else self.own.state())

    def load_state(self, state: State) -> FloatArray:
        """See ``VectorEngine.load_state``; ``state`` is that of this rank's part."""
        return self._whole(self.ranks.together(lambda: None if self.own is None else self.own.load_state(state)))

    def close(self) -> None:
        """See ``VectorEngine.close``."""
        if self.own is not None:
            self.own.close()

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Do what may fail, and keep how it did until all ranks can hear of it."""
        if self._failure is not None:
            return None
        try:
            return action()
        except (RunFailure, UserError) as failure:
            self._failure = failure
            return None

    def _fail(self) -> None:
        failure, self._failure = self._failure, None
        self.ranks.say("failed", 0)
        if failure is not None:
            raise failure

    def _whole(self, obs: FloatArray | None) -> FloatArray:
        """Put the observations of all ranks together."""
        rows = np.zeros((self.num_tasks, self.envs_per_task, self.obs_size), np.float32)
        if obs is not None:
            rows[self._slots] = obs
        whole: FloatArray = self.ranks.unite(torch.from_numpy(rows)).numpy()
        return whole
