"""The vector engine for suites whose tasks are single environments."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from varshare_rl.envs.division import Part, choose_workers, divide
from varshare_rl.envs.slots import Buffers, Chunk, EngineSpec, TaskEnvFactory
from varshare_rl.envs.suite import FloatArray, Frame, PendingActions, State, Step, check_identity
from varshare_rl.envs.workers import RESET, STEP, STEP_RANGE, WorkerPool, Workers
from varshare_rl.errors import UserError

#: What a state calls the numbers of its tasks and environments where it is a part's, and their counts.
_AXES = (("tasks", "num_tasks"), ("envs", "envs_per_task"))


def _numbers(state: State) -> tuple[Sequence[int], Sequence[int]]:
    """Return the numbers of the tasks and of the environments whose slots a saved engine has, in order."""
    tasks, envs = (state.get(axis, range(state[count])) for axis, count in _AXES)
    return tasks, envs


def leave_out(state: State, task: int, env: int, episode: int) -> None:
    """Have a saved engine pass over a training episode that fails, if the slot is one of its own.

    A slot that is in the middle of that episode then begins the next one.
    """
    tasks, envs = _numbers(state)
    if task in tasks and env in envs:
        slot = state["slots"][tasks.index(task) * len(envs) + envs.index(env)]
        slot["left_out"] = sorted({*slot.get("left_out", ()), episode})


def cut_off(saved: State, loaded: State) -> list[tuple[int, int]]:
    """Return task and environment of every slot whose episode was under way when ``saved``, and does not go on.

    ``loaded`` is the state right after ``saved`` was loaded: an episode that is left out, or cannot be played
    again, has given way to the next.
    """
    if "slots" not in saved:  # of an engine that puts every episode back
        return []
    tasks, envs = _numbers(saved)
    places = [(task, env) for task in tasks for env in envs]
    pairs = zip(places, saved["slots"], loaded["slots"], strict=True)
    return [
        place for place, old, new in pairs if len(old["actions"]) and int(old["episode"]) != int(new["episode"])
    ]


class SlotEngine:
    """Steps one environment per slot, in this process or in workers (``varshare_rl.envs.suite.VectorEngine``).

    Episode ``j`` of a slot depends on the seed, the task, the slot and ``j`` alone (see
    ``EngineSpec.episode``), never on the number of workers. Engines that are given the same ``processes`` share
    them. ``step_seconds`` has a number per task: roughly what a step of its environment takes, by which tasks are
    divided over workers. With a ``part`` it has these slots alone, see ``Suite.make_engine``. With ``stagger`` the
    first training episodes of a task's environments are cut, evenly spread over as many steps; ``most_steps`` cuts
    all that are longer.
    """

    def __init__(
        self,
        factory: TaskEnvFactory,
        *,
        step_seconds: Sequence[float],
        envs_per_task: int,
        observation_size: int,
        action_space: gymnasium.spaces.Box | gymnasium.spaces.Discrete,
        seed: int,
        evaluation: bool,
        workers: int,
        processes: Workers | None = None,
        task_names: Sequence[str] = (),
        part: Part | None = None,
        stagger: int = 0,
        most_steps: int | None = None,
    ) -> None:
        if envs_per_task < 1:
            raise UserError(f"envs_per_task={envs_per_task} is not possible: it must be at least 1")
        if seed < 0:
            raise UserError(f"seed={seed} is not possible: it must be 0 or more")
        if part is not None:
            step_seconds, envs_per_task = part.of(step_seconds), len(part.envs)
        num_tasks = len(step_seconds)
        box = isinstance(action_space, gymnasium.spaces.Box)
        self.num_tasks = num_tasks
        self.envs_per_task = envs_per_task
        self.spec = EngineSpec(
            num_tasks=num_tasks,
            envs_per_task=envs_per_task,
            observation_size=observation_size,
            action_shape=tuple(action_space.shape or ()),
            action_dtype="float32" if box else "int64",
            seed=seed,
            evaluation=evaluation,
            task_names=tuple(task_names),
            part=part,
            stagger=stagger,
            most_steps=most_steps,
        )
        self.workers = choose_workers(workers, envs_per_task, step_seconds)
        self._pool: WorkerPool | None = None
        self._chunk: Chunk | None = None
        if self.workers > 1:
            parts = divide(step_seconds, envs_per_task, self.workers)
            self._pool = (processes or Workers()).open(factory, self.spec, parts)
            self._buffers = self._pool.buffers
        else:
            self._buffers = Buffers.over(self.spec, bytearray(Buffers.size(self.spec)))
            self._chunk = Chunk(factory, self.spec, range(self.spec.num_slots), self._buffers)
        grid = (num_tasks, envs_per_task)
        tasks = np.arange(num_tasks, dtype=np.int64) if part is None else np.array(part.tasks, np.int64)
        self._task_id = np.broadcast_to(tasks[:, None], grid)
        self._started = False
        self._turns = PendingActions(num_tasks, envs_per_task)

    def reset(self) -> FloatArray:
        """See ``VectorEngine.reset``."""
        if self._pool is not None:
            self._pool.command(RESET)
        else:
            self._require_chunk().reset()
        self._started = True
        self._turns.clear()
        return self._grid(self._buffers.obs)

    def step(self, actions: npt.NDArray[Any]) -> Step:
        """See ``VectorEngine.step``. Raises ValueError for a wrong shape, RuntimeError before ``reset``."""
        self.begin(actions, slice(None))
        return self.finish()

    def begin(self, actions: npt.NDArray[Any], envs: slice) -> None:
        """See ``VectorEngine.begin``. Raises ValueError for a wrong shape, RuntimeError before ``reset``."""
        if not self._started:
            raise RuntimeError("step before reset: call reset or load_state first")
        first, last, _ = envs.indices(self.envs_per_task)
        going_on = self._turns.begun
        self._turns.give(actions, envs, self.spec.action_shape)
        everywhere = self._buffers.actions
        everywhere.reshape(self.num_tasks, self.envs_per_task, *self.spec.action_shape)[:, envs] = actions
        if self._pool is not None:
            self._pool.post(STEP + struct.pack(STEP_RANGE, first, last), go_on=going_on)
        else:
            self._require_chunk().step(first, last)

    def finish(self) -> Step:
        """See ``VectorEngine.finish``."""
        self._turns.complete()
        if self._pool is not None:
            self._pool.wait()
        buffers = self._buffers
        flags = self._grid(buffers.flags)
        return Step(
            obs=self._grid(buffers.obs),
            next_obs=self._grid(buffers.next_obs),
            reward=self._grid(buffers.reward),
            terminated=flags[..., 0],
            truncated=flags[..., 1],
            success=flags[..., 2],
            task_id=self._task_id.copy(),
        )

    def render(self) -> list[Frame]:
        """See ``RenderingEngine.render``; for engines without workers."""
        return [slot.env.render() for slot in self._require_chunk().slots if slot.env_index == 0]

    def state(self) -> State:
        """See ``VectorEngine.state``: per slot the number of its episode and the actions since its start."""
        if not self._started:
            raise RuntimeError("state before reset: call reset or load_state first")
        slots = self._pool.states() if self._pool is not None else self._require_chunk().state()
        return {**self._identity(), "slots": slots}

    def load_state(self, state: State) -> FloatArray:
        """See ``VectorEngine.load_state``; replays the actions of every slot's current episode."""
        check_identity(state, self._identity())
        if self._pool is not None:
            self._pool.load(state["slots"])
        else:
            self._require_chunk().load_state(state["slots"])
        self._started = True
        self._turns.clear()
        return self._grid(self._buffers.obs)

    def close(self) -> None:
        """See ``VectorEngine.close``."""
        self._started = False
        if self._pool is not None:
            self._pool.close()
        if self._chunk is not None:
            self._chunk.close()
            self._chunk = None

    def _identity(self) -> State:
        spec = self.spec
        part = {} if spec.part is None else {"tasks": list(spec.part.tasks), "envs": list(spec.part.envs)}
        return {
            "num_tasks": spec.num_tasks,
            "envs_per_task": spec.envs_per_task,
            "seed": spec.seed,
            "evaluation": spec.evaluation,
            **part,
        }

    def _require_chunk(self) -> Chunk:
        if self._chunk is None:
            raise RuntimeError("this engine is closed: make a new one")
        return self._chunk

    def _grid(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array.reshape(self.num_tasks, self.envs_per_task, *array.shape[1:]).copy()
