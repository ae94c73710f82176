"""The package's own vector environments with the goals of one of our suites, for its own evaluation.

``metaworld.evaluation.evaluation(agent, official_envs(suite), num_episodes=goals_per_task)`` then visits
exactly the goals of ``suite.make_engine(..., evaluation=True)``, each once, in another order. It ends
episodes at the first success, so its returns are smaller than ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import metaworld
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from varshare_rl.envs.metaworld import MetaWorldSuite, as_tasks


def official_envs(suite: MetaWorldSuite, seed: int = 0) -> gymnasium.vector.SyncVectorEnv:
    """One official environment per task, in the suite's order, sweeping the suite's goals without repeats.

    Observations are float64 ``[T, 39]``. ``seed`` decides the order of the goals alone.
    """
    make: Any = metaworld._init_each_env
    makers = [
        partial(
            make,
            env_cls=ALL_V3_ENVIRONMENTS[name],
            tasks=as_tasks(name, goals),
            seed=seed,
            max_episode_steps=suite.horizon,
            task_select="pseudorandom",
            reward_function_version=suite.config.reward_function_version,
        )
        for name, goals in zip(suite.task_names, suite.goals, strict=True)
    ]
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    envs = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=mode)
    envs.call("toggle_sample_tasks_on_reset", True)
    return envs
