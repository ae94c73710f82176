"""The protocol that every task suite follows.

A suite is a list of tasks with one observation space and one action space. It hands out vector
engines, which step all tasks at once. Arrays are task-major: ``[T, E, ...]`` with ``T`` tasks and ``E``
environments per task; the slot ``(t, e)`` always holds task ``t``. This package knows neither torch nor
the learner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
import numpy.typing as npt

from varshare_rl.envs.division import Part
from varshare_rl.envs.spaces import TaskSpaces
from varshare_rl.errors import UserError

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
#: A picture: height, width and three bytes of colour.
Frame = npt.NDArray[np.uint8]

#: Entries of a suite in a result: plain values by name.
Provenance = Mapping[str, str | int | float | bool | None]

#: A nested structure of dicts and lists with leaves ndarray, int, float, str, bool or None.
State = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One vector step. Every array is the caller's to keep.

    ``obs`` is what to act on next: at the end of an episode the slot has already been reset, and ``obs``
    is the first observation of the new episode. ``next_obs`` is the true successor of the action, which at
    the end of an episode is the last observation of the old one. ``success`` is the flag of this step (not
    "so far"); suites without a notion of success leave it False and say ``has_success = False``.
    """

    obs: FloatArray  # [T, E, F]
    next_obs: FloatArray  # [T, E, F]
    reward: FloatArray  # [T, E]
    terminated: BoolArray  # [T, E]  the task ended: there is no future value
    truncated: BoolArray  # [T, E]  a time limit cut the episode: bootstrap from next_obs
    success: BoolArray  # [T, E]
    task_id: IntArray  # [T, E]


class VectorEngine(Protocol):
    """Steps ``T x E`` environments. A slot's trajectory depends on (seed, task, e) alone."""

    num_tasks: int
    envs_per_task: int

    def reset(self) -> FloatArray:
        """Restart every slot at its episode 0 and return the observations, ``[T, E, F]``.

        Two calls return the same arrays, and the same actions afterwards give the same steps.
        """

    def step(self, actions: npt.NDArray[Any]) -> Step:
        """Step every slot. ``actions``: ``[T, E, A]`` float32 for Box, ``[T, E]`` integers for Discrete."""

    def begin(self, actions: npt.NDArray[Any], envs: slice) -> None:
        """Hand over the actions of some environments of every task, ``[T, len(envs), ...]``.

        Workers begin with them at once, while the caller computes the actions of the others.
        """

    def finish(self) -> Step:
        """Complete the step begun; every environment must have been given its action.

        ``begin(actions, slice(None))`` and ``finish()`` are ``step(actions)``.
        """

    def state(self) -> State:
        """Everything needed to go on bit for bit in a fresh engine of the same suite and seed."""

    def load_state(self, state: State) -> FloatArray:
        """Put a state back; returns the current observations, ``[T, E, F]``."""

    def close(self) -> None:
        """Free processes and memory. May be called twice."""


class RenderingEngine(VectorEngine, Protocol):
    """An engine that can be looked at."""

    def render(self) -> list[Frame]:
        """Draw the first environment of every task as it is now; sizes may differ."""


def check_identity(state: State, identity: State) -> None:
    """Raise UserError unless a saved state is of an engine with this ``identity``."""
    for name, value in identity.items():
        if state[name] != value:
            raise UserError(
                f"the saved environment state has {name} {state[name]}, this engine {value}: resume with "
                "the settings of the saved run"
            )


class PendingActions:
    """Environments of every task that have been given their action for the step under way.

    Args:
        num_tasks: ``T``.
        envs_per_task: ``E``.
    """

    def __init__(self, num_tasks: int, envs_per_task: int) -> None:
        self.num_tasks = num_tasks
        self.given = np.zeros(envs_per_task, dtype=np.bool_)

    def give(self, actions: npt.NDArray[Any], envs: slice, action_shape: tuple[int, ...]) -> None:
        """Note that ``envs`` have theirs; ``action_shape`` is that of one: ``(A,)`` for Box, ``()`` for Discrete.

        Raises:
            ValueError: ``actions`` is not ``[T, len(envs), *action_shape]``.
            RuntimeError: one of them has its action already.
        """
        expected = (self.num_tasks, len(self.given[envs]), *action_shape)
        if actions.shape != expected:
            raise ValueError(f"actions have shape {actions.shape}; this engine takes {expected}")
        if self.given[envs].any():
            raise RuntimeError("an environment was given a second action: call finish first")
        self.given[envs] = True

    @property
    def begun(self) -> bool:
        """Return True if any environment has its action."""
        return bool(self.given.any())

    def complete(self) -> None:
        """End the step. Raises RuntimeError if an environment has no action."""
        if not self.given.all():
            missing = np.flatnonzero(~self.given).tolist()
            raise RuntimeError(f"finish before environments {missing} were given an action: call begin for them")
        self.clear()

    def clear(self) -> None:
        """Forget a step that was begun."""
        self.given[:] = False


@runtime_checkable
class Suite(Protocol):
    """A list of tasks. Making a suite is cheap; engines are what costs. Inherit from it for what it implements."""

    name: str
    task_names: tuple[str, ...]
    observation_space: gymnasium.spaces.Box  # of one task, padded to the common size, float32
    action_space: gymnasium.spaces.Box | gymnasium.spaces.Discrete  # Box is always [-1, 1]
    action_mask: BoolArray  # [T, A] (A dimensions or choices); False where a task has no such action
    horizon: int  # the longest episode in steps
    has_success: bool

    @property
    def provenance(self) -> Provenance:
        """Entries that a result must have of this suite: versions of its packages, reward version, goals..."""

    def make_engine(
        self, envs_per_task: int, seed: int, evaluation: bool = False, part: Part | None = None
    ) -> VectorEngine:
        """Build an engine. Evaluation engines draw from seeds apart from the training ones.

        With a ``part`` it has these slots alone, as the whole engine would have them; arrays are
        ``[len(part.tasks), len(part.envs), ...]``.

        In evaluation episode ``j`` of slot ``e`` is episode ``j * envs_per_task + e`` of its task, and suites
        with a fixed list of goals sweep it in that order, so that ``n`` episodes see ``n`` different goals.
        """

    def make_rendering_engine(self, seed: int) -> RenderingEngine:
        """Build an evaluation engine of one environment per task, in this process, that can be looked at.

        Raises:
            UserError: there are no pictures of this suite, or they need what is not installed.
        """
        raise UserError(f"there are no pictures of env={self.name}; leave video=true out")

    @property
    def num_goals(self) -> int | None:
        """Number of the fixed goals of each task, which evaluation sweeps; None: starts are drawn without end."""
        return None

    def official_evaluation(
        self,
        act: Callable[[FloatArray], npt.NDArray[Any]],
        ended: Callable[[BoolArray], None],
        episodes: int,
        seed: int,
    ) -> Mapping[str, Mapping[str, float]]:
        """Evaluate as the authors of the suite publish it; means over a task's episodes, by task.

        Args:
            act: gives actions ``[T, A]`` for observations ``[T, F]``.
            ended: takes note of the tasks whose episode has ended, ``[T]``.
            episodes: of every task; seed: decides the order of the goals.

        Raises:
            UserError: there is no such protocol.
        """
        raise UserError(
            f"env={self.name} has no evaluation of its authors; give protocol=goals or quick, or episodes=<number>"
        )

    @property
    def observation_scale(self) -> tuple[FloatArray, FloatArray] | None:
        """Centre and size ``[F]`` of what observations vary over, where the suite knows; None: it does not."""
        return None

    @property
    def staggered(self) -> bool:
        """Return True where the first training episodes of all environments of a task but the last one are cut."""
        return False

    def remarks(self) -> Sequence[str]:
        """Return lines that a user should read before training, once engines can be made."""
        return ()

    def native_spaces(self, task: int) -> TaskSpaces:
        """Describe the task's own observation and actions; here they are those of the suite."""
        return TaskSpaces.of(self.observation_space, self.action_space)
