"""Gymnasium's LunarLander-v3 in variants: standard, windy and heavy.

An episode succeeds when its return reaches 200, the score that the environment's authors call a solution.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium

from varshare_rl.envs.batched import require_at_least_one
from varshare_rl.envs.gymnasium_suite import GymnasiumMaker
from varshare_rl.envs.object_env import Maker
from varshare_rl.envs.objects import MakerSuite
from varshare_rl.envs.suite import Provenance
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.registry import register

SOLVED_RETURN = 200.0

#: Constructor arguments per variant. Gymnasium allows gravity in (-12, 0); its default is -10.
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    "windy": {"enable_wind": True, "wind_power": 15.0, "turbulence_power": 1.5},
    "heavy": {"gravity": -11.9},
}


@register("env", "lunarlander")
@dataclass
class LunarLanderConfig:
    """``env=lunarlander``: Gymnasium's LunarLander-v3 as it is, windy, and heavy."""

    name: str = "lunarlander"
    tasks: list[str] = field(default_factory=lambda: list(VARIANTS))
    "Any of `standard`, `windy`, `heavy`."
    continuous: bool = False
    "Throttle (Box) in place of on and off (Discrete)."
    envs_per_task: int = bounded(1, least=1)
    "Environments of every task."
    workers: int = bounded(0, least=0)
    "Processes that step the environments; 0: as many as pay, 1: this one."
    horizon: int = bounded(1000, least=1, most=10**9)
    "Steps until an episode is truncated."

    def build(self) -> LunarLanderSuite:
        """Make the suite."""
        return LunarLanderSuite(self)


class SolvedReturn(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Adds the success flag to one lander, raised on the last step of an episode."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self._return = 0.0
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._return += float(reward)
        success = (terminated or truncated) and self._return >= SOLVED_RETURN
        info["success"] = success
        return obs, reward, terminated, truncated, info


@dataclass(frozen=True)
class LunarLanderMaker:
    """Makes the environment of a variant."""

    make: GymnasiumMaker

    def __call__(self) -> gymnasium.Env[Any, Any]:
        return SolvedReturn(self.make())


class LunarLanderSuite(MakerSuite):
    """The suite (``varshare_rl.envs.suite.Suite``). Raises UserError for impossible options."""

    step_seconds = 1e-4

    def __init__(self, config: LunarLanderConfig) -> None:
        names = tuple(config.tasks)
        for name in names:
            if name not in VARIANTS:
                raise UserError(f"unknown LunarLander task {name!r}: choose from {', '.join(VARIANTS)}")
        if len(set(names)) != len(names) or not names:
            raise UserError(f"LunarLander tasks [{', '.join(names)}]: list one or more, each once")
        require_at_least_one("horizon", config.horizon)
        kwargs = {name: VARIANTS[name] | {"continuous": config.continuous} for name in names}
        self.config = config
        makers = {n: LunarLanderMaker(GymnasiumMaker("LunarLander-v3", config.horizon, kwargs[n])) for n in names}
        super().__init__(config.name, makers, config.workers, success=True)

    def with_pictures(self, make: Maker) -> Maker:
        """See ``MakerSuite.with_pictures``."""
        assert isinstance(make, LunarLanderMaker)
        return LunarLanderMaker(make.make.with_pictures())

    @property
    def provenance(self) -> Provenance:
        """Versions, tasks, horizon and the meaning of success."""
        return {
            **super().provenance,
            "continuous": self.config.continuous,
            "success": f"return >= {SOLVED_RETURN:g}",
        }
