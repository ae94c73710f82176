"""Steps per second on Meta-World MT10: our engine, gymnasium's, and the physics alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from experiments.bench.contenders import Contender, Round, Setting, measure
from experiments.bench.report import Goal, Ratio, Section
from varshare_rl.envs.metaworld import MetaWorldConfig, MetaWorldSuite
from varshare_rl.envs.sawyer.tasks import as_tasks

TASKS, HORIZON, ACTION_SIZE, GOALS = 10, 500, 4, 50
STATE = mujoco.mjtState.mjSTATE_INTEGRATION

Actions = npt.NDArray[np.float32]


def _actions(steps: int) -> Actions:
    """Random actions ``[steps, T, 1, A]``, the same for everyone."""
    return np.random.default_rng(0).uniform(-1, 1, (steps, TASKS, 1, ACTION_SIZE)).astype(np.float32)


def _rounds(step: Callable[[Actions], Any], setting: Setting) -> Round:
    """Steps per second over one episode of every task, the resets at its end included."""
    actions = _actions(setting.pick(HORIZON, 5))

    def work() -> float:
        begin = time.perf_counter()
        for action in actions:
            step(action)
        return len(actions) * TASKS / (time.perf_counter() - begin)

    return work


def _ours(workers: int, fast: bool, setting: Setting) -> Round:
    suite = MetaWorldSuite(MetaWorldConfig(benchmark="mt10", envs_per_task=1, workers=workers, fast=fast))
    engine = suite.make_engine(1, seed=0)
    engine.reset()
    return _rounds(engine.step, setting)


def _gymnasium(strategy: str, setting: Setting) -> Round:
    import gymnasium
    import metaworld  # noqa: F401  (registers the environments)

    envs = gymnasium.make_vec("Meta-World/MT10", vector_strategy=strategy, seed=0)
    envs.reset(seed=0)
    return _rounds(lambda action: envs.step(action[:, 0]), setting)


def _physics(processes: int, setting: Setting) -> Round:
    """The simulator's part of a step and nothing else, the tasks divided over the processes."""
    parts = [part.tolist() for part in np.array_split(np.arange(TASKS), processes)]
    if processes == 1:
        return _physics_of(parts[0], setting)
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in parts]
    for tasks, (_, theirs) in zip(parts, ends, strict=True):
        context.Process(target=_serve_physics, args=(tasks, setting, theirs), daemon=True).start()
    for ours, _ in ends:
        ours.recv()

    def work() -> float:
        begin = time.perf_counter()
        for ours, _ in ends:
            ours.send(None)
        for ours, _ in ends:
            ours.recv()
        return setting.pick(HORIZON, 5) * TASKS / (time.perf_counter() - begin)

    return work


def _serve_physics(tasks: Sequence[int], setting: Setting, connection: Connection) -> None:
    work = _physics_of(tasks, setting)
    connection.send(None)
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            connection.recv()
            work()
            connection.send(None)


def _physics_of(tasks: Sequence[int], setting: Setting) -> Round:
    """What ``step`` asks of MuJoCo, on the models and from the states of the official environments."""
    worlds: list[tuple[int, Any, npt.NDArray[np.float64]]] = []
    suite = MetaWorldSuite(MetaWorldConfig(benchmark="mt10", fast=False))
    for task in tasks:
        name = suite.task_names[task]
        env: Any = ALL_V3_ENVIRONMENTS[name]()
        env.set_task(as_tasks(name, suite.goals[task])[0])
        env.reset()
        state = np.empty(mujoco.mj_stateSize(env.model, STATE))
        mujoco.mj_getState(env.model, env.data, state, STATE)
        worlds.append((task, env, state))
    actions = _actions(setting.pick(HORIZON, 5))[:, :, 0].astype(np.float64)

    def work() -> float:
        begin = time.perf_counter()
        for _, env, state in worlds:
            mujoco.mj_setState(env.model, env.data, state, STATE)
        for action in actions:
            for task, env, _ in worlds:
                model, data = env.model, env.data
                position = data.mocap_pos[0] + action[task, :3] * env.action_scale
                data.mocap_pos[0] = position.clip(env.mocap_low, env.mocap_high)
                data.ctrl[:] = (action[task, 3], -action[task, 3])
                mujoco.mj_step(model, data, nstep=env.frame_skip)
                mujoco.mj_forward(model, data)
        return len(actions) * len(worlds) / (time.perf_counter() - begin)

    return work


def _reset(setting: Setting) -> Round:
    """Milliseconds per reset of the fast path, in process, to goals that every environment has seen."""
    suite = MetaWorldSuite(MetaWorldConfig(benchmark="mt10", envs_per_task=1, workers=1))
    engine = suite.make_engine(1, seed=0)
    resets = setting.pick(GOALS, 2)
    for _ in range(2 * resets):  # goals come round: the second time all are known
        engine.reset()

    def work() -> float:
        begin = time.perf_counter()
        for _ in range(resets):
            engine.reset()
        return (time.perf_counter() - begin) / (resets * TASKS) * 1e3

    return work


STEPS: dict[str, Contender] = {
    "gymnasium async (10 processes)": partial(_gymnasium, "async"),
    "gymnasium sync": partial(_gymnasium, "sync"),
    "ours, official path, in process": partial(_ours, 1, False),
    "ours, official path, 2 workers": partial(_ours, 2, False),
    "ours, fast path, in process": partial(_ours, 1, True),
    "ours, fast path, 2 workers": partial(_ours, 2, True),
    "physics alone, 1 process": partial(_physics, 1),
    "physics alone, 2 processes": partial(_physics, 2),
}
RESETS: dict[str, Contender] = {"ours, fast path": _reset}
CONTENDERS: dict[str, Contender] = {**STEPS, **RESETS}


def run(rounds: int, setting: Setting) -> list[Section]:
    """One environment per task, random actions, one episode with its resets per round."""
    values = measure(__name__, list(STEPS), rounds, setting)
    ratios = [
        Ratio("ours, fast path, 2 workers", "gymnasium async (10 processes)", Goal(3.5, at_least=True)),
        Ratio("ours, fast path, in process", "gymnasium sync", Goal(2.5, at_least=True)),
        Ratio("ours, official path, 2 workers", "gymnasium async (10 processes)"),
        Ratio("ours, fast path, in process", "physics alone, 1 process"),
        Ratio("ours, fast path, 2 workers", "physics alone, 2 processes"),
    ]
    resets = measure(__name__, list(RESETS), rounds, setting)
    return [
        Section("Engine on MT10, one environment per task", "steps/s", values, ratios),
        Section("Reset to a goal seen before, MT10", "ms", resets, goals={"ours, fast path": Goal(0.5)}),
    ]
