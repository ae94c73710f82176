"""Meta-World v3 (Yu et al., 2019; the package ``metaworld``): MT1, MT10, MT25, MT50 and any list of tasks.

The environments are the package's own, without its wrappers: 39 observations with the goal visible, cast to
float32; 4 actions; no termination; episodes are cut at the horizon. MT3 is not an official benchmark: it is
reach, push and pick-place, the first three of MT10.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import gymnasium
import metaworld
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3, MT25_V3, MT50_V3
from metaworld.evaluation import evaluation
from metaworld.types import Task

from varshare_rl.envs.division import Part
from varshare_rl.envs.engine import SlotEngine
from varshare_rl.envs.metaworld_fast import FastMetaWorldEnv, environment_classes, is_supported
from varshare_rl.envs.metaworld_methods import forget_models
from varshare_rl.envs.pictures import choose_gl, render
from varshare_rl.envs.slots import Array, Episode, TaskEnv, TimedEnv, with_time
from varshare_rl.envs.suite import BoolArray, FloatArray, Provenance, Suite
from varshare_rl.envs.workers import Workers
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.registry import register

_OBSERVATION_SIZE = 39
_ACTION_SIZE = 4
#: Arguments of an environment that can be rendered.
PICTURE = {"render_mode": "rgb_array", "camera_name": "corner4", "width": 256, "height": 256}

BENCHMARKS: dict[str, tuple[str, ...]] = {
    "mt3": ("reach-v3", "push-v3", "pick-place-v3"),
    "mt10": tuple(MT10_V3),
    "mt25": tuple(MT25_V3),
    "mt50": tuple(MT50_V3),
}
#: Benchmarks whose goals the package draws from one random stream over all tasks.
_ONE_STREAM = ("mt10", "mt25", "mt50")
#: Microseconds of a step of each task, for dividing tasks over workers: medians over five episodes of random
#: actions on the fast path, on one core of the machine in ``experiments/bench``. No result depends on them.
# fmt: off
STEP_MICROSECONDS: dict[str, int] = {
    "assembly-v3": 116, "basketball-v3": 87, "bin-picking-v3": 99, "box-close-v3": 162,
    "button-press-topdown-v3": 75, "button-press-topdown-wall-v3": 72, "button-press-v3": 71,
    "button-press-wall-v3": 70, "coffee-button-v3": 89, "coffee-pull-v3": 106, "coffee-push-v3": 100,
    "dial-turn-v3": 93, "disassemble-v3": 120, "door-close-v3": 77, "door-lock-v3": 78, "door-open-v3": 82,
    "door-unlock-v3": 78, "drawer-close-v3": 80, "drawer-open-v3": 84, "faucet-close-v3": 70, "faucet-open-v3": 73,
    "hammer-v3": 127, "hand-insert-v3": 118, "handle-press-side-v3": 103, "handle-press-v3": 68,
    "handle-pull-side-v3": 77, "handle-pull-v3": 73, "lever-pull-v3": 77, "peg-insert-side-v3": 96,
    "peg-unplug-side-v3": 111, "pick-out-of-hole-v3": 87, "pick-place-v3": 98, "pick-place-wall-v3": 98,
    "plate-slide-back-side-v3": 76, "plate-slide-back-v3": 73, "plate-slide-side-v3": 76, "plate-slide-v3": 75,
    "push-back-v3": 99, "push-v3": 92, "push-wall-v3": 96, "reach-v3": 76, "reach-wall-v3": 77,
    "shelf-place-v3": 98, "soccer-v3": 94, "stick-pull-v3": 124, "stick-push-v3": 132, "sweep-into-v3": 94,
    "sweep-v3": 96, "window-close-v3": 78, "window-open-v3": 76,
}
# fmt: on


@register("env", "metaworld")
@dataclass
class MetaWorldConfig:
    """``env=metaworld``: Meta-World v3, its benchmarks or any list of its tasks."""

    name: str = "metaworld"
    benchmark: str | None = None
    "`mt1` (with one of `env.tasks`), `mt3`, `mt10`, `mt25` or `mt50`; null: the list in `env.tasks`."
    tasks: list[str] = field(default_factory=list)
    "Names of tasks such as `reach-v3`."
    envs_per_task: int = bounded(4, least=1)
    "Environments of every task."
    workers: int = bounded(0, least=0)
    "Processes that step the environments; 0: as many as pay, 1: this one."
    reward_function_version: str = "v2"
    "Rewards: `v2`, the usual ones, or the older `v1`."
    horizon: int = bounded(500, least=1, most=10**9)
    "Steps until an episode is truncated."
    goals_per_task: int = bounded(50, least=1)
    "Fixed goals of every task."
    goal_seed: int = 0
    "Seed of the fixed goals; the same as `seed` of Meta-World's own benchmarks."
    observe_time: bool = False
    "Observations end with the share of the horizon that has passed, from -1 to 1."
    fast: bool = True
    "The quicker environments with the same results to the bit (v2 rewards only)."

    def build(self) -> MetaWorldSuite:
        """Make the suite. Raises UserError for impossible options."""
        return MetaWorldSuite(self)


def task_list(config: MetaWorldConfig) -> tuple[str, ...]:
    """The tasks that the options ask for. Raises UserError for an impossible choice."""
    names, benchmark = tuple(config.tasks), config.benchmark
    if benchmark is not None and benchmark != "mt1":
        if benchmark not in BENCHMARKS:
            raise UserError(f"unknown Meta-World benchmark {benchmark!r}: choose mt1, {', '.join(BENCHMARKS)}")
        if names:
            raise UserError(f"benchmark {benchmark} has its own tasks: leave tasks empty or benchmark null")
        return BENCHMARKS[benchmark]
    if benchmark == "mt1" and len(names) != 1:
        raise UserError(f"benchmark mt1 needs exactly one task, {len(names)} given: set tasks=[reach-v3]")
    if not names:
        raise UserError("no Meta-World tasks given: set tasks=[reach-v3,...] or benchmark=mt10")
    for name in names:
        if name not in ALL_V3_ENVIRONMENTS:
            close = difflib.get_close_matches(name, ALL_V3_ENVIRONMENTS, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else "names look like reach-v3"
            raise UserError(f"unknown Meta-World task {name!r}: {hint}")
    if len(set(names)) != len(names):
        raise UserError(f"a Meta-World task is listed twice in {', '.join(names)}: list each once")
    return names


@lru_cache(maxsize=8)
def make_goals(
    names: tuple[str, ...], seed: int, goals_per_task: int, one_stream: bool, fast: bool = False
) -> tuple[npt.NDArray[np.float64], ...]:
    """The fixed goals of each task, ``[goals, size]``, the same that the package draws with this seed.

    ``one_stream`` draws all tasks one after the other from one seeded stream, as ``metaworld.MT10(seed)``
    does; otherwise task ``k`` starts its own stream from ``seed + k``, as the package's custom list of tasks
    does. The package simulates the arm at every draw, which the goals do not depend on; here it is left out.
    ``fast`` compiles models where ``varshare_rl.envs.metaworld_fast`` finds them again.
    """
    classes = environment_classes() if fast else ALL_V3_ENVIRONMENTS
    saved = np.random.get_state()  # noqa: NPY002 (the package draws from the global stream)
    try:
        goals = []
        for k, name in enumerate(names):
            if k == 0 or not one_stream:
                np.random.seed(seed if one_stream else seed + k)  # noqa: NPY002
            goals.append(_draw_goals(classes[name], goals_per_task))
    finally:
        np.random.set_state(saved)  # noqa: NPY002
    return tuple(goals)


def _draw_goals(cls: Any, count: int) -> npt.NDArray[np.float64]:
    env = cls()
    env._freeze_rand_vec = False
    env._set_task_called = True
    env.do_simulation = lambda *_: None
    env._get_obs = lambda: np.zeros(_OBSERVATION_SIZE)
    goals = []
    for _ in range(count):
        env.reset()
        goals.append(env._last_rand_vec)
    env.close()
    return np.array(goals)


def as_tasks(name: str, goals: npt.NDArray[np.float64]) -> list[Task]:
    """The goals of one task (``[goals, size]``) in the form that the package's ``set_task`` takes."""
    cls = ALL_V3_ENVIRONMENTS[name]
    return [
        Task(name, pickle.dumps({"rand_vec": goal, "env_cls": cls, "partially_observable": False}))
        for goal in goals
    ]


class MetaWorldEnv:
    """One Meta-World task (a ``TaskEnv``). Training draws a goal per episode, evaluation sweeps."""

    def __init__(
        self,
        name: str,
        goals: npt.NDArray[np.float64],
        reward_version: str,
        horizon: int,
        picture: Mapping[str, Any] | None = None,
    ) -> None:
        self._env: Any = ALL_V3_ENVIRONMENTS[name](reward_function_version=reward_version, **(picture or {}))
        self._env.max_path_length = horizon
        quality = self._env.model.vis.quality
        quality.shadowsize = quality.offsamples = 0  # without a GPU a picture would take ten times as long
        self._tasks = as_tasks(name, goals)

    def reset(self, episode: Episode) -> Array:
        self._env.set_task(self._tasks[episode.choose(len(self._tasks))])
        observation: Array = self._env.reset()[0]
        return observation

    def step(self, action: Array) -> tuple[Array, float, bool, bool, bool]:
        obs, reward, terminated, truncated, info = self._env.step(action)
        return obs, float(reward), terminated, truncated, info["success"] == 1.0

    def render(self) -> npt.NDArray[np.uint8]:
        frame: npt.NDArray[np.uint8] = render(self._env)
        return frame[::-1, ::-1]  # the package's cameras hang upside down

    def close(self) -> None:
        self._env.close()


@dataclass(frozen=True)
class MetaWorldFactory:
    """Makes the environment of a task; sent to the workers."""

    names: tuple[str, ...]
    goals: tuple[npt.NDArray[np.float64], ...]
    reward_version: str
    horizon: int
    fast: bool
    observe_time: bool = False
    picture: Mapping[str, Any] | None = None  # arguments of environments that can be rendered

    def __call__(self, task: int) -> TaskEnv:
        name, goals = self.names[task], self.goals[task]
        env: TaskEnv
        if self.fast and self.picture is None:
            env = FastMetaWorldEnv(name, goals, self.horizon)
        else:
            env = MetaWorldEnv(name, goals, self.reward_version, self.horizon, self.picture)
        return TimedEnv(env, self.horizon) if self.observe_time else env


class MetaWorldSuite(Suite):
    """The suite (``varshare_rl.envs.suite.Suite``). Raises UserError for impossible options."""

    has_success = True

    def __init__(self, config: MetaWorldConfig) -> None:
        self.task_names = task_list(config)
        version = config.reward_function_version
        if version not in ("v1", "v2"):
            raise UserError(f"unknown Meta-World reward_function_version {version!r}: choose v1 or v2")
        for key in ("horizon", "goals_per_task"):
            if getattr(config, key) < 1:
                raise UserError(f"{key}={getattr(config, key)} is not possible: it must be at least 1")
        self.name = config.benchmark or config.name
        self.config = config
        self.horizon = config.horizon
        self._workers = Workers()
        self.fast = config.fast and version == "v2" and is_supported()
        self.observation_space = Box(-np.inf, np.inf, (_OBSERVATION_SIZE + config.observe_time,), np.float32)
        self.action_space = Box(-1.0, 1.0, (_ACTION_SIZE,), np.float32)
        self.action_mask = np.ones((len(self.task_names), _ACTION_SIZE), dtype=np.bool_)

    @property
    def provenance(self) -> Provenance:
        """Versions, reward version, horizon, goals and tasks."""
        return {
            "suite": self.name,
            "metaworld": importlib.metadata.version("metaworld"),
            "mujoco": importlib.metadata.version("mujoco"),
            "gymnasium": gymnasium.__version__,
            "reward_function_version": self.config.reward_function_version,
            "horizon": self.horizon,
            "goals_per_task": self.config.goals_per_task,
            "goal_seed": self.config.goal_seed,
            "tasks": ",".join(self.task_names),
        }

    @property
    def observation_scale(self) -> tuple[FloatArray, FloatArray]:
        """See ``Suite.observation_scale``: positions on the table in metres, an opening of 0 to 1, quaternions.

        An observation is hand, opening and two objects (position, quaternion), those of the step before, the goal.
        """
        places, sizes = np.array([0.0, 0.6, 0.15]), np.full(3, 0.1)
        centre = np.concatenate([places, [0.5], places, np.zeros(4), np.zeros(7)])
        size = np.concatenate([sizes, [0.5], sizes, np.full(4, 0.5), np.full(3, 0.3), np.full(4, 0.5)])
        time = ([0.0], [1.0]) if self.config.observe_time else ([], [])
        found = zip((centre, size), (places, sizes), time, strict=True)
        mean, std = (np.concatenate([x, x, goal, end]).astype(np.float32) for x, goal, end in found)
        return mean, std

    @property
    def goals(self) -> tuple[npt.NDArray[np.float64], ...]:
        """The fixed goals, one array ``[goals_per_task, size]`` per task."""
        config = self.config
        one_stream = config.benchmark in _ONE_STREAM
        return make_goals(self.task_names, config.goal_seed, config.goals_per_task, one_stream, self.fast)

    @property
    def num_goals(self) -> int:
        """See ``Suite.num_goals``."""
        return self.config.goals_per_task

    def official_evaluation(
        self, act: Callable[[FloatArray], Array], ended: Callable[[BoolArray], None], episodes: int, seed: int
    ) -> Mapping[str, Mapping[str, float]]:
        """See ``Suite.official_evaluation``; the package's ends an episode at its first success."""
        time = self.horizon if self.config.observe_time else None
        agent, envs = _OfficialAgent(act, ended, len(self.task_names), time), official_envs(self, seed)
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
            for name, steps in zip(self.task_names, agent.episode_steps, strict=True)
        }

    def make_rendering_engine(self, seed: int) -> SlotEngine:
        """See ``Suite.make_rendering_engine``; pictures are of the package's own environments."""
        choose_gl()
        return self._engine(1, seed, evaluation=True, workers=1, picture=PICTURE)

    def make_engine(
        self, envs_per_task: int, seed: int, evaluation: bool = False, part: Part | None = None
    ) -> SlotEngine:
        """See ``Suite.make_engine``; evaluation episode ``k`` of a task has goal ``k % goals_per_task``."""
        return self._engine(envs_per_task, seed, evaluation, self.config.workers, part=part)

    def _engine(
        self,
        envs_per_task: int,
        seed: int,
        evaluation: bool,
        workers: int,
        picture: Mapping[str, Any] | None = None,
        part: Part | None = None,
    ) -> SlotEngine:
        config = self.config
        factory = MetaWorldFactory(
            self.task_names, self.goals, config.reward_function_version, self.horizon, self.fast,
            config.observe_time, picture,
        )  # fmt: skip
        engine = SlotEngine(
            factory,
            step_seconds=[STEP_MICROSECONDS[name] * 1e-6 for name in self.task_names],
            envs_per_task=envs_per_task,
            observation_size=self.observation_space.shape[0],
            action_space=self.action_space,
            seed=seed,
            evaluation=evaluation,
            workers=workers,
            processes=self._workers,
            task_names=self.task_names,
            part=part,
        )
        if engine.workers > 1:
            forget_models()  # the goals were drawn here, but the environments live elsewhere
        return engine


class _OfficialAgent:
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
    one_stream = suite.config.benchmark in _ONE_STREAM
    makers = [
        partial(
            make,
            env_cls=ALL_V3_ENVIRONMENTS[name],
            tasks=as_tasks(name, goals),
            seed=seed if one_stream else seed + number,  # as the package has it
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
