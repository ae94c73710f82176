"""The package's own evaluation, and what it takes: its vector environments, and an agent as it asks one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import gymnasium
import metaworld
import numpy as np
import numpy.typing as npt
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.evaluation import evaluation

from varshare_rl.envs.sawyer.tasks import as_tasks
from varshare_rl.envs.slots import Array, with_time
from varshare_rl.envs.suite import BoolArray, FloatArray

if TYPE_CHECKING:
    from varshare_rl.envs.metaworld import MetaWorldSuite


def official_results(
    suite: MetaWorldSuite,
    act: Callable[[FloatArray], Array],
    ended: Callable[[BoolArray], None],
    episodes: int,
    seed: int,
) -> Mapping[str, Mapping[str, float]]:
    """See ``Suite.official_evaluation``."""
    time = suite.horizon if suite.config.observe_time else None
    agent, envs = OfficialAgent(act, ended, len(suite.task_names), time), official_envs(suite, seed)
    try:
        _, _, successes, returns = evaluation(agent, envs, num_episodes=episodes)
    finally:
        envs.close()
    return {
        name: {
            "return": float(np.mean(returns[name])),
            "episode_steps": float(np.mean(steps[:episodes])),
            "success": successes[name],
            "success_final": successes[name],  # the last step is that of the success
        }
        for name, steps in zip(suite.task_names, agent.episode_steps, strict=True)
    }


class OfficialAgent:
    """A policy as the package's evaluation asks it; notes the length of every episode.

    ``horizon``: of the time at the end of its observations, if it sees one.
    """

    def __init__(
        self,
        act: Callable[[FloatArray], Array],
        ended: Callable[[BoolArray], None],
        num_tasks: int,
        horizon: int | None = None,
    ) -> None:
        self._act, self._ended, self._horizon = act, ended, horizon
        self._steps = np.zeros(num_tasks, dtype=np.int64)
        self.episode_steps: list[list[int]] = [[] for _ in range(num_tasks)]

    def eval_action(self, observations: npt.NDArray[np.float64]) -> Array:
        seen = observations.astype(np.float32)
        if self._horizon is not None:
            seen = with_time(seen, self._steps, self._horizon)
        self._steps += 1
        return self._act(seen)

    def reset(self, env_mask: BoolArray) -> None:
        if not self._steps.any():  # before the first step
            return
        for task in np.flatnonzero(env_mask):
            self.episode_steps[task].append(int(self._steps[task]))
        self._steps[env_mask] = 0
        self._ended(env_mask)


def official_envs(suite: MetaWorldSuite, seed: int = 0) -> gymnasium.vector.SyncVectorEnv:
    """The package's own vector environments, one per task in the suite's order, for its own evaluation.

    ``metaworld.evaluation.evaluation(agent, official_envs(suite), num_episodes=goals_per_task)`` visits exactly
    the goals of ``suite.make_engine(..., evaluation=True)``, each once, in an order that ``seed`` decides. It ends
    episodes at the first success, so its returns are smaller than ours. Observations are float64 ``[T, 39]``.
    """
    make: Any = metaworld._init_each_env
    makers = [
        partial(
            make,
            env_cls=ALL_V3_ENVIRONMENTS[name],
            tasks=as_tasks(name, goals),
            seed=seed if suite.one_stream else seed + number,  # as the package has it
            max_episode_steps=suite.horizon,
            task_select="pseudorandom",
            reward_function_version=suite.config.reward_function_version,
        )
        for number, (name, goals) in enumerate(zip(suite.task_names, suite.goals, strict=True))
    ]
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    envs = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=mode)
    envs.call("toggle_sample_tasks_on_reset", True)
    return envs
