"""Any registered gymnasium environments as the tasks of one suite.

They become functions that make them; the rest is the suite of environment objects (``varshare_rl.envs.objects``).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium

from varshare_rl.envs.batched import require_at_least_one
from varshare_rl.envs.object_env import Maker, one_line
from varshare_rl.envs.objects import MakerSuite
from varshare_rl.envs.suite import Provenance
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.registry import register


@register("env", "gymnasium")
@dataclass
class GymnasiumConfig:
    """``env=gymnasium``: any registered Gymnasium environments; unequal spaces are padded and masked."""

    name: str = "gymnasium"
    ids: list[str] = field(default_factory=list)
    "Registered ids such as `Hopper-v5`, or `module:Id-v0` to import a module first."
    envs_per_task: int = bounded(1, least=1)
    "Environments of every task."
    workers: int = bounded(0, least=0)
    "Processes that step the environments; 0: as many as pay, 1: this one."
    horizon: int | None = bounded(None, least=1, most=10**9)
    "Steps until an episode is truncated; null: each environment's registered limit."
    names: list[str] = field(default_factory=list)
    "Task names, one for every id; empty: the ids, the second of the same id with `#2`."
    kwargs: Any = None  # a dict; typed so, Hydra would refuse keys that it does not know
    """Dict of arguments of `gymnasium.make` for all ids; under an id or a task's name, a dict for it alone
    (`Pendulum-v1@2` for the task `Pendulum-v1#2`)."""
    wrappers: list[str] = field(default_factory=list)
    """Wrappers around every environment, innermost first, as `module:Class`; the module is imported, so a
    configuration from a folder that names one runs code of that module. Where a reset does not make them forget
    the episodes before, everything is made anew for every episode."""
    success: bool | None = None
    "Environments report `info[success]` or `info[is_success]`; null looks at the first step."

    def modules(self) -> list[str]:
        """Return the modules that making the environments imports because they are named here."""
        named = [entry.partition(":")[0] for entry in (*self.ids, *self.wrappers) if ":" in entry]
        return [name for name in dict.fromkeys(named) if name.partition(".")[0] != "gymnasium"]

    def build(self) -> GymnasiumSuite:
        """Make the suite. Raises UserError for impossible options."""
        return GymnasiumSuite(self)


@dataclass(frozen=True)
class GymnasiumMaker:
    """``gymnasium.make`` without the checking wrapper, and wrappers around it. Raises UserError, one line."""

    env_id: str
    horizon: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()

    def with_pictures(self) -> GymnasiumMaker:
        """Return a maker of the same environment that can be rendered."""
        return replace(self, kwargs={**self.kwargs, "render_mode": "rgb_array"})

    def __call__(self) -> gymnasium.Env[Any, Any]:
        try:
            with warnings.catch_warnings():
                # Box2D's import warns so; with warnings as errors it ends the process instead of raising.
                warnings.filterwarnings("ignore", r"builtin type \w+ has no __module__ attribute")
                env = gymnasium.make(
                    self.env_id, max_episode_steps=self.horizon, disable_env_checker=True, **self.kwargs
                )
        except (Exception, SystemExit) as error:
            message = f"cannot make the gymnasium environment {self.env_id!r}: {one_line(error)}"
            raise UserError(message) from error
        for wrapper in self.wrappers:
            module, _, name = wrapper.partition(":")
            try:
                env = getattr(importlib.import_module(module), name)(env)
            except Exception as error:
                raise UserError(
                    f"cannot wrap {self.env_id} in env.wrappers entry {wrapper!r} (module:Class): {one_line(error)}"
                ) from error
        return env


class GymnasiumSuite(MakerSuite):
    """The suite (``varshare_rl.envs.suite.Suite``). Raises UserError for impossible options."""

    def __init__(self, config: GymnasiumConfig) -> None:
        ids = tuple(config.ids)
        if not ids:
            raise UserError("no gymnasium environments given: set ids=[Hopper-v5,...]")
        if config.horizon is not None:
            require_at_least_one("horizon", config.horizon)
        names = _task_names(ids, config.names)
        makers = {
            name: GymnasiumMaker(i, config.horizon, _kwargs(config, i, name, names), tuple(config.wrappers))
            for i, name in zip(ids, names, strict=True)
        }
        self.config = config
        super().__init__(config.name, makers, config.workers, config.success)

    def with_pictures(self, make: Maker) -> Maker:
        """See ``MakerSuite.with_pictures``."""
        assert isinstance(make, GymnasiumMaker)
        return make.with_pictures()

    @property
    def provenance(self) -> Provenance:
        """Versions, ids and horizon; constructor arguments and wrappers where there are any."""
        config = self.config
        chosen = {"kwargs": str(config.kwargs or ""), "wrappers": ",".join(config.wrappers)}
        return {
            "suite": self.name,
            "gymnasium": gymnasium.__version__,
            "mujoco": importlib.metadata.version("mujoco"),
            "tasks": ",".join(self.task_names),
            "ids": ",".join(config.ids),
            "horizon": self.horizon,
            **{key: value for key, value in chosen.items() if value},
        }


def _task_names(ids: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The names given, or the ids without repeats: the second ``A-v0`` is called ``A-v0#2``."""
    if names:
        if len(names) != len(ids) or len(set(names)) != len(names):
            raise UserError(
                f"names=[{','.join(names)}] for {len(ids)} ids: give each id a name of its own, or none"
            )
        return tuple(names)
    seen: Counter[str] = Counter()
    made = []
    for env_id in ids:
        seen[env_id] += 1
        made.append(env_id if seen[env_id] == 1 else f"{env_id}#{seen[env_id]}")
    return tuple(made)


def _kwargs(config: GymnasiumConfig, env_id: str, name: str, names: Sequence[str]) -> dict[str, Any]:
    """The constructor's arguments of one task: those of all, then those of its id, then its own."""
    given = config.kwargs or {}
    if not isinstance(given, Mapping):
        raise UserError(f"kwargs={given!r} is no dict of arguments: give for example kwargs={{frame_skip: 2}}")
    given = {
        str(key).replace("@", "#"): value for key, value in given.items()
    }  # Pendulum-v1@2: # is no key of Hydra's
    kwargs = {key: value for key, value in given.items() if key not in names and key not in config.ids}
    for key in dict.fromkeys((env_id, name)):
        own = given.get(key, {})
        if not isinstance(own, Mapping):
            raise UserError(f"kwargs has {key}={own!r}: under a task's name belongs a dict of arguments")
        kwargs |= own
    return kwargs
