"""Environment objects of the user's own as the tasks of one suite: a name and a function that makes it for each.

Observations are padded with zeros to the longest, actions to the most dimensions or choices; ``action_mask``
says which actions a task really has (see ``spaces``). ``info["success"]`` or ``info["is_success"]`` of a step is
its success flag.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from varshare_rl.envs.batched import require_at_least_one
from varshare_rl.envs.division import Part
from varshare_rl.envs.engine import SlotEngine
from varshare_rl.envs.object_env import EnvFactory, Habits, Maker, find_habits, make_env, one_line
from varshare_rl.envs.pictures import choose_gl
from varshare_rl.envs.spaces import TaskSpaces
from varshare_rl.envs.suite import Provenance, Suite
from varshare_rl.envs.workers import Workers
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.registry import register


@register("env", "objects")
@dataclass
class ObjectsConfig:
    """``env=objects``: environments that are Python objects; the functions that make them come beside it."""

    name: str = "objects"
    tasks: list[str] = field(default_factory=list)
    "Task names in order; empty: all environments that are given."
    envs_per_task: int = bounded(1, least=1)
    "Environments of every task that are stepped side by side."
    workers: int = bounded(1, least=0)
    "Processes; 0: as many as pay, 1: this one; more need functions that other processes can import."
    horizon: int | None = bounded(None, least=1, most=10**9)
    "Steps until an episode is truncated; null: each environment's own limit."
    success: bool | None = None
    "Environments report success in their info; null looks at the first step."
    spaces: list[dict[str, Any]] = field(default_factory=list)
    "Spaces of each task, written when the environments are first made: an agent acts without them by these."

    def build(self, makers: Mapping[str, Maker] | None = None) -> ObjectSuite:
        """Make the suite. Without ``makers`` it has the spaces that were written, and no engines."""
        return ObjectSuite(self, makers)


@dataclass(frozen=True)
class TimeLimited:
    """A maker whose environments are truncated after ``horizon`` steps."""

    make: Maker
    horizon: int

    def __call__(self) -> gymnasium.Env[Any, Any]:
        return gymnasium.wrappers.TimeLimit(self.make(), self.horizon)


@dataclass(frozen=True)
class Description:
    """Properties of one task that are known only by making its environment."""

    spaces: TaskSpaces
    horizon: int
    success: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for a configuration file."""
        spaces = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.spaces).items()}
        return {**spaces, "horizon": self.horizon, "success": self.success}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Description:
        """Take the values of :meth:`to_dict` back."""
        spaces: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        horizon, success = spaces.pop("horizon"), spaces.pop("success")
        return Description(TaskSpaces(**spaces), horizon, success)


def _inspect(name: str, make: Maker, success: bool | None) -> Description:
    env = make_env(name, make)
    try:
        try:
            spaces = TaskSpaces.of(env.observation_space, env.action_space)
        except UserError as error:
            raise UserError(f"{name} {error}") from error
        limit = env.spec.max_episode_steps if env.spec is not None else None
        if limit is None and env.has_wrapper_attr("_max_episode_steps"):  # of a TimeLimit
            limit = env.get_wrapper_attr("_max_episode_steps")
        if limit is None:
            raise UserError(f"{name} has no time limit of its own: set horizon, for example horizon=1000")
        return Description(spaces, int(limit), _reports_success(name, env) if success is None else success)
    finally:
        env.close()


def _reports_success(name: str, env: gymnasium.Env[Any, Any]) -> bool:
    env.action_space.seed(0)
    try:
        env.reset(seed=0)
        info = env.step(env.action_space.sample())[4]
    except Exception as error:
        raise UserError(f"the environment {name!r} fails at its first step: {one_line(error)}") from error
    return "success" in info or "is_success" in info


_REMEMBERS = (
    "a reset leaves something of the episodes before, so a new environment is made for every episode; without that "
    "no run could be repeated or resumed"
)
_DIFFERS = (
    "new environments do not play the same seed and actions in the same way, so this run cannot be repeated; a "
    "resumed one begins new episodes"
)


class MakerSuite(Suite):
    """A suite whose tasks are environments made by functions. Raises UserError for impossible options."""

    #: One step of one environment, roughly.
    step_seconds = 5e-5

    def __init__(
        self,
        name: str,
        tasks: Mapping[str, Maker],
        workers: int,
        success: bool | None = None,
        saved: Sequence[Description] = (),
    ) -> None:
        names = tuple(tasks)
        inspected = list(saved) or [_inspect(task, make, success) for task, make in tasks.items()]
        if len({task.spaces.discrete for task in inspected}) > 1:
            kinds = ", ".join(
                f"{task_name} ({'Discrete' if task.spaces.discrete else 'Box'})"
                for task_name, task in zip(names, inspected, strict=True)
            )
            raise UserError(f"Discrete and Box actions cannot be mixed in one suite: {kinds}; run them apart")
        longest = max(task.spaces.obs_size for task in inspected)
        most = max(task.spaces.action_size for task in inspected)
        self.descriptions = [
            replace(task, spaces=replace(task.spaces, policy_obs_size=longest)) for task in inspected
        ]
        self.name = name
        self.task_names = names
        self.horizon = max(task.horizon for task in inspected)
        self.has_success = all(task.success for task in inspected)
        self.action_mask = np.arange(most) < np.array([[task.spaces.action_size] for task in inspected])
        self.action_space = Discrete(most) if inspected[0].spaces.discrete else Box(-1.0, 1.0, (most,), np.float32)
        self.observation_space = Box(-np.inf, np.inf, (longest,), np.float32)
        self.makers = tuple(tasks.values())
        self._habits: tuple[Habits, ...] = ()  # once there are engines
        self._workers, self._processes = workers, Workers()

    def native_spaces(self, task: int) -> TaskSpaces:
        """See ``Suite.native_spaces``."""
        return self.descriptions[task].spaces

    @property
    def provenance(self) -> Provenance:
        """Versions, tasks and horizon."""
        return {
            "suite": self.name,
            "gymnasium": gymnasium.__version__,
            "tasks": ",".join(self.task_names),
            "horizon": self.horizon,
        }

    @property
    def habits(self) -> tuple[Habits, ...]:
        """Habits of every task's environment; the first call tries them out. Raises UserError where one fails."""
        if not self._habits:
            found: list[Habits] = []
            for task, (name, make) in enumerate(zip(self.task_names, self.makers, strict=True)):
                same = self.makers.index(make)
                found.append(found[same] if same < task else find_habits(name, make, self.native_spaces(task)))
            self._habits = tuple(found)
        return self._habits

    def remarks(self) -> list[str]:
        """See ``Suite.remarks``."""
        remarks = []
        for names, text in (
            ([n for n, h in self._named_habits() if h.remembers and h.repeats], _REMEMBERS),
            ([n for n, h in self._named_habits() if not h.repeats], _DIFFERS),
        ):
            if names:
                remarks.append(f"{', '.join(names)}: {text}")
        return remarks

    def _named_habits(self) -> Iterator[tuple[str, Habits]]:
        return zip(self.task_names, self.habits, strict=True)

    def make_engine(
        self, envs_per_task: int, seed: int, evaluation: bool = False, part: Part | None = None
    ) -> SlotEngine:
        """See ``Suite.make_engine``."""
        return self._engine(self.makers, envs_per_task, seed, evaluation, self._workers, part)

    def make_rendering_engine(self, seed: int) -> SlotEngine:
        """See ``Suite.make_rendering_engine``."""
        choose_gl(needed=False)  # only some of these are MuJoCo's
        return self._engine(tuple(map(self.with_pictures, self.makers)), 1, seed, evaluation=True, workers=1)

    def with_pictures(self, make: Maker) -> Maker:
        """Return a maker of the same environment that can be rendered; here makers are taken as they are."""
        return make

    def _engine(
        self,
        makers: tuple[Maker, ...],
        envs_per_task: int,
        seed: int,
        evaluation: bool,
        workers: int,
        part: Part | None = None,
    ) -> SlotEngine:
        spaces = tuple(task.spaces for task in self.descriptions)
        return SlotEngine(
            EnvFactory(self.task_names, makers, spaces, self.habits),
            step_seconds=[self.step_seconds] * len(self.task_names),
            envs_per_task=envs_per_task,
            observation_size=self.observation_space.shape[0],
            action_space=self.action_space,
            seed=seed,
            evaluation=evaluation,
            workers=workers,
            processes=self._processes,
            task_names=self.task_names,
            part=part,
        )


class ObjectSuite(MakerSuite):
    """Environments of the user's own, by task name. Raises UserError for impossible options.

    Their spaces are written to ``config.spaces``. With these, and without ``makers``, the suite describes its
    tasks to an agent that acts, and has no engines.
    """

    def __init__(self, config: ObjectsConfig, makers: Mapping[str, Maker] | None = None) -> None:
        self.config = config
        saved = [Description.from_dict(task) for task in config.spaces]
        if makers is None:
            if not saved or len(saved) != len(config.tasks):
                raise UserError(_NO_MAKERS)
            super().__init__(config.name, dict.fromkeys(config.tasks, _no_maker), config.workers, saved=saved)
            return
        super().__init__(config.name, _chosen(makers, config), config.workers, config.success)
        if saved and saved != self.descriptions:
            changed = [n for n, a, b in zip(config.tasks, saved, self.descriptions, strict=False) if a != b]
            raise UserError(
                f"the environments differ from those of the saved run in their spaces, horizon or success "
                f"({', '.join(changed) or 'another number of tasks'}): give the same ones"
            )
        config.tasks = list(self.task_names)
        config.spaces = [task.to_dict() for task in self.descriptions]


_NO_MAKERS = (
    "the environments of this suite are Python objects; give what makes them in Python: "
    "vs.train(envs={task: make, ...}) or vs.load(folder, envs={...})"
)


def _no_maker() -> gymnasium.Env[Any, Any]:
    raise UserError(_NO_MAKERS)


def _chosen(makers: Mapping[str, Maker], config: ObjectsConfig) -> dict[str, Maker]:
    """The makers of ``config.tasks`` in order, with the time limit of ``config.horizon``."""
    names = config.tasks or list(makers)
    if not names:
        raise UserError("no environments given: give at least one, envs={task: make}")
    for name in names:
        if name not in makers:
            raise UserError(f"no environment is given for task {name!r}: there are {', '.join(makers) or 'none'}")
        if not callable(makers[name]):
            raise UserError(
                f"the environment of task {name!r} is a {type(makers[name]).__name__}: give a function that makes "
                "a new one in every call, such as its class"
            )
    if len(set(names)) != len(names):
        raise UserError(f"a task is named twice in {', '.join(names)}: name each task once")
    limit = config.horizon
    if limit is not None:
        require_at_least_one("horizon", limit)
    return {name: makers[name] if limit is None else TimeLimited(makers[name], limit) for name in names}
