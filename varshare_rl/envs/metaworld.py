"""Meta-World v3 (Yu et al., 2019; the package ``metaworld``): MT1, MT10, MT25, MT50 and any list of tasks.

The environments are the package's own, without its wrappers: 39 observations with the goal visible, cast to
float32; 4 actions; no termination; episodes are cut at the horizon. MT3 is not an official benchmark: it is
reach, push and pick-place, the first three of MT10. The package itself is imported with the first suite, by
``varshare_rl.envs.sawyer``.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box

from varshare_rl.envs.division import Part
from varshare_rl.envs.engine import SlotEngine
from varshare_rl.envs.pictures import choose_gl
from varshare_rl.envs.sawyer import OBSERVATION_SIZE
from varshare_rl.envs.slots import Array
from varshare_rl.envs.suite import BoolArray, FloatArray, Provenance, Suite
from varshare_rl.envs.workers import Workers
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.registry import register

_ACTION_SIZE = 4
#: Arguments of an environment that can be rendered.
PICTURE = {"render_mode": "rgb_array", "camera_name": "corner4", "width": 256, "height": 256}

#: All tasks, in the order of MT50, and the microseconds of a step of each, for dividing tasks over workers: medians
#: over five episodes of random actions on the fast path, on one core of the machine in ``experiments/bench``. No
#: result depends on them.
# fmt: off
STEP_MICROSECONDS: dict[str, int] = {
    "assembly-v3": 116, "basketball-v3": 87, "bin-picking-v3": 99, "box-close-v3": 162,
    "button-press-topdown-v3": 75, "button-press-topdown-wall-v3": 72, "button-press-v3": 71,
    "button-press-wall-v3": 70, "coffee-button-v3": 89, "coffee-pull-v3": 106, "coffee-push-v3": 100,
    "dial-turn-v3": 93, "disassemble-v3": 120, "door-close-v3": 77, "door-lock-v3": 78, "door-open-v3": 82,
    "door-unlock-v3": 78, "hand-insert-v3": 118, "drawer-close-v3": 80, "drawer-open-v3": 84,
    "faucet-open-v3": 73, "faucet-close-v3": 70, "hammer-v3": 127, "handle-press-side-v3": 103,
    "handle-press-v3": 68, "handle-pull-side-v3": 77, "handle-pull-v3": 73, "lever-pull-v3": 77,
    "pick-place-wall-v3": 98, "pick-out-of-hole-v3": 87, "pick-place-v3": 98, "plate-slide-v3": 75,
    "plate-slide-side-v3": 76, "plate-slide-back-v3": 73, "plate-slide-back-side-v3": 76,
    "peg-insert-side-v3": 96, "peg-unplug-side-v3": 111, "soccer-v3": 94, "stick-push-v3": 132,
    "stick-pull-v3": 124, "push-v3": 92, "push-wall-v3": 96, "push-back-v3": 99, "reach-v3": 76,
    "reach-wall-v3": 77, "shelf-place-v3": 98, "sweep-into-v3": 94, "sweep-v3": 96, "window-open-v3": 76,
    "window-close-v3": 78,
}
_MT10 = (
    "reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3",
    "button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3",
)
_MT25 = (
    *_MT10,
    "coffee-pull-v3", "pick-out-of-hole-v3", "disassemble-v3", "pick-place-wall-v3", "basketball-v3",
    "stick-pull-v3", "button-press-wall-v3", "faucet-open-v3", "door-lock-v3", "lever-pull-v3", "sweep-into-v3",
    "faucet-close-v3", "coffee-button-v3", "button-press-topdown-wall-v3", "dial-turn-v3",
)
# fmt: on
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "mt3": _MT10[:3],
    "mt10": _MT10,
    "mt25": _MT25,
    "mt50": tuple(STEP_MICROSECONDS),
}  # fmt: skip
#: Benchmarks whose goals the package draws from one random stream over all tasks.
_ONE_STREAM = ("mt10", "mt25", "mt50")


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
    training_horizon: int | None = bounded(None, least=1, most=10**9)
    """Steps until a training episode is truncated, where that is sooner: more beginnings in as many transitions.
    Evaluation has `horizon`. Null: `horizon`."""
    staggered_resets: bool = True
    """The first training episodes of a task's environments are cut, evenly spread over the horizon. From there on
    a rollout that is shorter than an episode has all parts of one, and not the same part of each."""
    goals_per_task: int = bounded(50, least=1)
    "Fixed goals of every task."
    goal_seed: int = bounded(0, least=0, most=2**32 - 100)
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
        if name not in STEP_MICROSECONDS:
            close = difflib.get_close_matches(name, STEP_MICROSECONDS, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else "names look like reach-v3"
            raise UserError(f"unknown Meta-World task {name!r}: {hint}")
    if len(set(names)) != len(names):
        raise UserError(f"a Meta-World task is listed twice in {', '.join(names)}: list each once")
    return names


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
        shorter = config.training_horizon
        if shorter is not None and (shorter > config.horizon or config.observe_time):
            raise UserError(
                f"training_horizon={shorter} is not possible: it must be at most horizon, {config.horizon}, and "
                "observe_time must be false, as evaluation would show times that training never does"
            )
        self.name = config.benchmark or config.name
        self.config = config
        self.horizon = config.horizon
        self._workers = Workers()
        self.fast = config.fast and version == "v2" and _fast_is_supported()
        self.observation_space = Box(-np.inf, np.inf, (OBSERVATION_SIZE + config.observe_time,), np.float32)
        self.action_space = Box(-1.0, 1.0, (_ACTION_SIZE,), np.float32)
        self.action_mask = np.ones((len(self.task_names), _ACTION_SIZE), dtype=np.bool_)

    @property
    def provenance(self) -> Provenance:
        """Versions, reward version, horizon, goals and tasks."""
        shorter = self.config.training_horizon
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
            **({} if shorter is None else {"training_horizon": shorter}),
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
    def staggered(self) -> bool:
        """See ``Suite.staggered``."""
        return self.config.staggered_resets

    @property
    def goals(self) -> tuple[npt.NDArray[np.float64], ...]:
        """The fixed goals, one array ``[goals_per_task, size]`` per task."""
        from varshare_rl.envs.sawyer.tasks import make_goals

        config = self.config
        return make_goals(self.task_names, config.goal_seed, config.goals_per_task, self.one_stream, self.fast)

    @property
    def one_stream(self) -> bool:
        """True where the package draws the goals of all tasks from one random stream."""
        return self.config.benchmark in _ONE_STREAM

    @property
    def num_goals(self) -> int:
        """See ``Suite.num_goals``."""
        return self.config.goals_per_task

    def official_evaluation(
        self, act: Callable[[FloatArray], Array], ended: Callable[[BoolArray], None], episodes: int, seed: int
    ) -> Mapping[str, Mapping[str, float]]:
        """See ``Suite.official_evaluation``; the package's ends an episode at its first success."""
        from varshare_rl.envs.sawyer.official import official_results

        return official_results(self, act, ended, episodes, seed)

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
        from varshare_rl.envs.sawyer.methods import forget_models
        from varshare_rl.envs.sawyer.tasks import MetaWorldFactory

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
            stagger=(config.training_horizon or self.horizon) if config.staggered_resets else 0,
            most_steps=config.training_horizon,
        )
        if engine.workers > 1:
            forget_models()  # the goals were drawn here, but the environments live elsewhere
        return engine


def _fast_is_supported() -> bool:
    from varshare_rl.envs.sawyer.fast import is_supported

    return is_supported()
