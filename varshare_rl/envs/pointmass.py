"""Point mass: eight tasks on a plane that conflict, solved only by an agent that knows its task.

A mass with position and velocity is pushed by a force in [-1, 1]^2 and must be inside its goal's disc at the
end of the episode. There are four dynamics (normal; swapped: the force's axes are exchanged; flipped: its
sign is turned; heavy: more mass and drag), and each has two tasks with opposite goals.

**A policy blind to the task has mean success of at most 1/2.** Observations are position and velocity; the
goal is not among them. Take the two tasks of one dynamics. Their episodes start from the same draws and
move by the same equations, so a policy that is not told the task (whatever memory, noise or training it
has, as long as its inputs are observations and actions) produces the same final position in both. The goal
discs are disjoint, so at most one of the two episodes is a success: the two success rates sum to at most 1,
and the mean over all eight tasks is at most 1/2. For policies without noise this holds episode by episode,
because the two tasks draw the same starts; otherwise in expectation. It holds for complete pairs only, not
for a subset such as one task of each pair, and not for a policy whose inputs are normalised with statistics
kept per task, which tell it the task.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box
from PIL import Image, ImageDraw

from varshare_rl.envs.batched import BatchedEngine, Float64Array, require_at_least_one, select
from varshare_rl.envs.division import Part
from varshare_rl.envs.suite import Frame, Provenance, Suite
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.registry import register

TIME_STEP = 0.1  # seconds
FORCE = 2.0  # newtons for an action of 1
ARENA = 1.5  # the plane ends at this distance from the centre, on both axes
START = 0.1  # episodes start at rest within this distance of the centre, on both axes
GOAL_RADIUS = 0.3
TOP_SPEED = 2.0  # normal dynamics: FORCE / drag
REWARD_SCALE = 0.5
PICTURE = 256  # pixels of a side


class _Physics(NamedTuple):
    mass: float
    drag: float
    action: tuple[tuple[float, float], tuple[float, float]]  # force direction = matrix @ action


_IDENTITY = ((1.0, 0.0), (0.0, 1.0))
_DYNAMICS = {
    "normal": _Physics(1.0, 1.0, _IDENTITY),
    "swapped": _Physics(1.0, 1.0, ((0.0, 1.0), (1.0, 0.0))),
    "flipped": _Physics(1.0, 1.0, ((-1.0, 0.0), (0.0, -1.0))),
    "heavy": _Physics(2.0, 2.0, _IDENTITY),
}
_DIAGONAL = float(np.sqrt(0.5))
_TASKS: dict[str, tuple[str, tuple[float, float]]] = {
    "normal_left": ("normal", (-1.0, 0.0)),
    "normal_right": ("normal", (1.0, 0.0)),
    "swapped_left": ("swapped", (-1.0, 0.0)),
    "swapped_right": ("swapped", (1.0, 0.0)),
    "flipped_down": ("flipped", (0.0, -1.0)),
    "flipped_up": ("flipped", (0.0, 1.0)),
    "heavy_down_left": ("heavy", (-_DIAGONAL, -_DIAGONAL)),
    "heavy_up_right": ("heavy", (_DIAGONAL, _DIAGONAL)),
}

#: All tasks in order; the two goals of one dynamics are neighbours.
TASK_NAMES = tuple(_TASKS)


@register("env", "pointmass")
@dataclass
class PointMassConfig:
    """``env=pointmass``: eight point masses on a plane that conflict in pairs."""

    name: str = "pointmass"
    tasks: list[str] = field(default_factory=list)
    "Names of tasks; empty: all eight. `normal_left_2` is another `normal_left`."
    reward_scales: list[float] = field(default_factory=list)
    "Factors on the rewards of the tasks; empty: 1."
    horizon: int = bounded(40, least=1, most=10**9)
    "Steps of 0.1 s until an episode is truncated."
    envs_per_task: int = bounded(16, least=1)
    "Environments of every task."

    def build(self) -> PointMassSuite:
        """Make the suite."""
        return PointMassSuite(self)


class PointMassDynamics:
    """Semi-implicit Euler steps of ``mass * dv/dt = FORCE * M a - drag * v``, for ``[T, E]`` slots.

    The state is ``(x, y, vx, vy)`` in metres and metres per second. The reward is ``-REWARD_SCALE`` times the
    distance to the goal after the step, times the task's factor in ``reward_scales``. Running into the arena's
    border stops the motion across it.
    """

    def __init__(self, task_names: tuple[str, ...], horizon: int, reward_scales: Sequence[float] = ()) -> None:
        tasks = [_TASKS[original(name)] for name in task_names]
        physics = [_DYNAMICS[dynamics] for dynamics, _ in tasks]
        mass = np.array([p.mass for p in physics])[:, None, None]
        matrices = np.array([p.action for p in physics])  # [T, 2, 2]
        self.horizon = horizon
        self.goals = np.array([goal for _, goal in tasks])[:, None, :]  # [T, 1, 2]
        self._reward = -REWARD_SCALE * np.array(reward_scales or [1.0] * len(tasks))[:, None]  # [T, 1] per metre
        # One stream per dynamics: its two tasks draw the same starts (see the module's argument).
        self.streams = np.array([list(_DYNAMICS).index(dynamics) for dynamics, _ in tasks], np.int64)
        self._decay = 1.0 - TIME_STEP * np.array([p.drag for p in physics])[:, None, None] / mass
        # Transposed, so that actions [T, E, 2] are multiplied from the left.
        self._gain = matrices.transpose(0, 2, 1) * (TIME_STEP * FORCE / mass)

    def initial(self, uniforms: Float64Array) -> Float64Array:
        """Rest near the centre: ``[N, 4]`` states from ``[N, 4]`` uniforms."""
        states = np.zeros_like(uniforms)
        states[:, :2] = START * (2.0 * uniforms[:, :2] - 1.0)
        return states

    def advance(
        self, states: Float64Array, actions: npt.NDArray[Any]
    ) -> tuple[Float64Array, Float64Array, npt.NDArray[np.bool_]]:
        """One step: next states ``[T, E, 4]``, rewards ``[T, E]``, and no termination ever."""
        velocity = self._decay * states[..., 2:] + np.matmul(actions, self._gain)
        free = states[..., :2] + TIME_STEP * velocity
        position = np.clip(free, -ARENA, ARENA)
        velocity = np.where(position == free, velocity, 0.0)
        reward = self._reward * self._distance(position)
        return (
            np.concatenate([position, velocity], axis=-1),
            reward,
            np.zeros(reward.shape, dtype=np.bool_),
        )

    def achieved(self, states: Float64Array) -> npt.NDArray[np.bool_]:
        """Return True where the mass is inside its own goal's disc, ``[T, E]``."""
        inside: npt.NDArray[np.bool_] = self._distance(states[..., :2]) < GOAL_RADIUS
        return inside

    def draw(self, task: int, state: Float64Array) -> Frame:
        """Seen from above: the goal's disc, the mass, and a line to where it is in half a second."""
        image = Image.new("RGB", (PICTURE, PICTURE), "white")
        pen = ImageDraw.Draw(image)

        def pixels(x: float, y: float) -> tuple[float, float]:
            return PICTURE / 2 * (1 + x / ARENA), PICTURE / 2 * (1 - y / ARENA)

        per_metre = PICTURE / (2 * ARENA)
        pen.circle(pixels(*self.goals[task, 0]), GOAL_RADIUS * per_metre, fill="#a9dfbf", outline="#1e8449")
        position, ahead = pixels(*state[:2]), pixels(*(state[:2] + 0.5 * state[2:]))
        pen.line((*position, *ahead), fill="#5d6d7e", width=2)
        pen.circle(position, 6, fill="#0072b2")
        return np.array(image)

    def check_actions(self, actions: npt.NDArray[Any], slots: tuple[int, int]) -> Float64Array:
        """Actions ``[T, E, 2]`` clipped to [-1, 1]."""
        if actions.shape != (*slots, 2):
            raise UserError(f"actions have shape {actions.shape}: pointmass wants {(*slots, 2)}")
        return np.clip(actions.astype(np.float64), -1.0, 1.0)

    def _distance(self, position: Float64Array) -> Float64Array:
        offset = position - self.goals
        distance: Float64Array = np.sqrt(np.square(offset).sum(axis=-1))
        return distance


class PointMassSuite(Suite):
    """The point-mass tasks as a ``varshare_rl.envs.suite.Suite``. Raises UserError for impossible options."""

    name = "pointmass"
    has_success = True

    def __init__(self, config: PointMassConfig) -> None:
        require_at_least_one("horizon", config.horizon)
        require_at_least_one("envs_per_task", config.envs_per_task)
        copies = tuple(name for name in config.tasks if original(name) in TASK_NAMES)
        self.task_names = select(config.tasks, (*TASK_NAMES, *copies), self.name)
        self.reward_scales = check_reward_scales(config.reward_scales, len(self.task_names))
        self.horizon = config.horizon
        high = np.array([ARENA, ARENA, TOP_SPEED, TOP_SPEED], dtype=np.float32)
        self.observation_space = Box(-high, high, dtype=np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), dtype=np.float32)
        self.action_mask = np.ones((len(self.task_names), 2), dtype=np.bool_)

    @property
    def provenance(self) -> Provenance:
        """Everything that a result of this suite depends on."""
        stated = {"reward_scales": ", ".join(f"{scale:g}" for scale in self.reward_scales)}
        scales = stated if self.reward_scales else {}
        return {"suite": self.name, "horizon": self.horizon, "numpy": np.__version__, **scales}

    def make_rendering_engine(self, seed: int) -> BatchedEngine:
        """See ``Suite.make_rendering_engine``."""
        return self.make_engine(1, seed, evaluation=True)

    def make_engine(
        self, envs_per_task: int, seed: int, evaluation: bool = False, part: Part | None = None
    ) -> BatchedEngine:
        """An engine of ``T x envs_per_task`` slots; cheap."""
        names, scales = self.task_names, self.reward_scales
        if part is not None:
            names, scales = tuple(part.of(names)), tuple(part.of(scales) if scales else ())
        dynamics = PointMassDynamics(names, self.horizon, scales)
        return BatchedEngine(dynamics, envs_per_task, seed, evaluation, part)


def original(name: str) -> str:
    """The task that a name stands for: ``normal_left_2`` is a further copy of ``normal_left``."""
    return re.sub(r"_[0-9]+$", "", name)


def check_reward_scales(scales: Sequence[float], num_tasks: int) -> tuple[float, ...]:
    """The scales, if there is none or a positive one for every task. Raises UserError otherwise."""
    if scales and len(scales) != num_tasks:
        raise UserError(
            f"reward_scales has {len(scales)} numbers for {num_tasks} tasks: give one for every task, or none"
        )
    for scale in scales:
        if not 0 < scale < np.inf:
            raise UserError(f"reward_scales has {scale}: scales must be positive and finite")
    return tuple(scales)
