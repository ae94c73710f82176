"""Cart and pole in variants of the pole's length, the motor's force and gravity.

The equations are those of gymnasium's ``CartPole-v1`` (Barto, Sutton and Anderson, "Neuronlike adaptive
elements that can solve difficult learning control problems", 1983, with the corrections of Florian, 2007),
explicit Euler steps of 0.02 s; the task ``standard`` takes the same steps as ``CartPole-v1``.

There are two sets. In ``variants`` the same balancing needs other gains; in ``identical`` four tasks are all
the standard one, so that the ideal agent shares everything and has nothing to specialise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Discrete
from PIL import Image, ImageDraw

from varshare_rl.envs.batched import BatchedEngine, Float64Array, require_at_least_one, select
from varshare_rl.envs.division import Part
from varshare_rl.envs.suite import Frame, Provenance, Suite
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.registry import register

TIME_STEP = 0.02  # seconds
MASS_CART = 1.0
MASS_POLE = 0.1
MASS_TOTAL = MASS_POLE + MASS_CART
X_LIMIT = 2.4  # metres
ANGLE_LIMIT = 12 * 2 * np.pi / 360  # radians
PICTURE = (256, 256, 200)  # pixels: width, height, and where the ground is
START = 0.05  # every component of the first state lies within this


class _Variant(NamedTuple):
    half_length: float = 0.5  # metres, half the pole
    force: float = 10.0  # newtons
    gravity: float = 9.8  # metres per second squared


_SETS: dict[str, dict[str, _Variant]] = {
    "variants": {
        "standard": _Variant(),
        "long": _Variant(half_length=1.0),
        "short": _Variant(half_length=0.25),
        "strong": _Variant(force=15.0),
        "weak": _Variant(force=5.0),
        "heavy_gravity": _Variant(gravity=19.6),
    },
    "identical": {f"identical_{index}": _Variant() for index in range(4)},
}

#: Task names by set.
TASK_NAMES = {name: tuple(variants) for name, variants in _SETS.items()}


@register("env", "cartpole")
@dataclass
class CartPoleConfig:
    """``env=cartpole``: poles to balance, in variants of length, force and gravity."""

    name: str = "cartpole"
    variant_set: str = "variants"
    "Set of tasks: `variants`, or `identical` for four that are the same."
    tasks: list[str] = field(default_factory=list)
    "Names of tasks in the set; empty: all of it."
    horizon: int = bounded(500, least=1, most=10**9)
    "Steps of 0.02 s until an episode is truncated."
    envs_per_task: int = bounded(16, least=1)
    "Environments of every task."

    def build(self) -> CartPoleSuite:
        """Make the suite."""
        return CartPoleSuite(self)


class CartPoleDynamics:
    """The equations for ``[T, E]`` slots; states are ``(x, x_dot, theta, theta_dot)``, in m and rad."""

    def __init__(self, variants: list[_Variant], horizon: int) -> None:
        self.horizon = horizon
        self.streams = np.arange(len(variants), dtype=np.int64)
        self._length = np.array([variant.half_length for variant in variants])[:, None]
        self._force = np.array([variant.force for variant in variants])[:, None]
        self._gravity = np.array([variant.gravity for variant in variants])[:, None]
        self._pole_moment = MASS_POLE * self._length

    def initial(self, uniforms: Float64Array) -> Float64Array:
        """Near upright rest: ``[N, 4]`` states from ``[N, 4]`` uniforms."""
        return START * (2.0 * uniforms - 1.0)

    def advance(
        self, states: Float64Array, actions: npt.NDArray[Any]
    ) -> tuple[Float64Array, Float64Array, npt.NDArray[np.bool_]]:
        """One step: next states ``[T, E, 4]``, a reward of 1, and whether the pole fell, ``[T, E]``."""
        x, x_dot, theta, theta_dot = np.moveaxis(states, -1, 0)
        force = np.where(actions == 1, self._force, -self._force)
        cos, sin = np.cos(theta), np.sin(theta)
        # The order of operations is CartPole-v1's, so that the standard task rounds as it does.
        push = (force + self._pole_moment * np.square(theta_dot) * sin) / MASS_TOTAL
        theta_acc = (self._gravity * sin - cos * push) / (
            self._length * (4.0 / 3.0 - MASS_POLE * np.square(cos) / MASS_TOTAL)
        )
        x_acc = push - self._pole_moment * theta_acc * cos / MASS_TOTAL
        after = np.stack(
            [
                x + TIME_STEP * x_dot,
                x_dot + TIME_STEP * x_acc,
                theta + TIME_STEP * theta_dot,
                theta_dot + TIME_STEP * theta_acc,
            ],
            axis=-1,
        )
        fell = (np.abs(after[..., 0]) > X_LIMIT) | (np.abs(after[..., 2]) > ANGLE_LIMIT)
        return after, np.ones(fell.shape), fell

    def achieved(self, states: Float64Array) -> npt.NDArray[np.bool_]:
        """A pole that still stands at the horizon is a success wherever it stands, ``[T, E]``."""
        return np.ones(states.shape[:-1], dtype=np.bool_)

    def draw(self, task: int, state: Float64Array) -> Frame:
        """From the side, the pole in its length."""
        width, height, ground = PICTURE
        image = Image.new("RGB", (width, height), "white")
        pen = ImageDraw.Draw(image)
        per_metre = width / (2 * X_LIMIT + 1)
        x, length = width / 2 + per_metre * state[0], 2 * per_metre * self._length[task, 0]
        pen.line((0, ground, width, ground), fill="#5d6d7e", width=2)
        pen.rectangle((x - 20, ground - 22, x + 20, ground - 2), fill="#222222")
        top = (x + length * np.sin(state[2]), ground - 22 - length * np.cos(state[2]))
        pen.line((x, ground - 22, *top), fill="#d55e00", width=6)
        return np.array(image)

    def check_actions(self, actions: npt.NDArray[Any], slots: tuple[int, int]) -> npt.NDArray[Any]:
        """Actions ``[T, E]``: 0 pushes left, 1 pushes right."""
        if actions.shape != slots:
            raise UserError(f"actions have shape {actions.shape}: cartpole wants {slots}")
        if not ((actions == 0) | (actions == 1)).all():
            raise UserError("a cartpole action is neither 0 (left) nor 1 (right): give one of the two")
        return actions


class CartPoleSuite(Suite):
    """The cart-pole tasks as a ``varshare_rl.envs.suite.Suite``. Raises UserError for impossible options."""

    name = "cartpole"
    has_success = True

    def __init__(self, config: CartPoleConfig) -> None:
        if config.variant_set not in _SETS:
            raise UserError(f"unknown cartpole variant_set '{config.variant_set}': choose from {', '.join(_SETS)}")
        require_at_least_one("horizon", config.horizon)
        require_at_least_one("envs_per_task", config.envs_per_task)
        self.task_names = select(config.tasks, TASK_NAMES[config.variant_set], self.name)
        self.horizon = config.horizon
        high = np.array([2 * X_LIMIT, np.inf, 2 * ANGLE_LIMIT, np.inf], dtype=np.float32)
        self.observation_space = Box(-high, high, dtype=np.float32)
        self.action_space = Discrete(2)
        self.action_mask = np.ones((len(self.task_names), 2), dtype=np.bool_)
        self._variant_set = config.variant_set
        self._variants = [_SETS[config.variant_set][name] for name in self.task_names]

    @property
    def provenance(self) -> Provenance:
        """Everything that a result of this suite depends on."""
        return {
            "suite": self.name,
            "variant_set": self._variant_set,
            "horizon": self.horizon,
            "numpy": np.__version__,
            "gymnasium": gymnasium.__version__,
        }

    def make_rendering_engine(self, seed: int) -> BatchedEngine:
        """See ``Suite.make_rendering_engine``."""
        return self.make_engine(1, seed, evaluation=True)

    def make_engine(
        self, envs_per_task: int, seed: int, evaluation: bool = False, part: Part | None = None
    ) -> BatchedEngine:
        """An engine of ``T x envs_per_task`` slots; cheap."""
        dynamics = CartPoleDynamics(self._variants if part is None else part.of(self._variants), self.horizon)
        if part is not None:
            dynamics.streams = np.array(part.tasks, np.int64)
        return BatchedEngine(dynamics, envs_per_task, seed, evaluation, part)
