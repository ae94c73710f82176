"""The package's environments with the same results, bit for bit, in less than half the time.

A second, private copy of the package's environment modules is imported, and a few of its functions are
exchanged for quicker ones that do the same arithmetic in the same order; the package that everyone else
imports stays untouched. Nothing here is specific to a task:

- MuJoCo's accessors by name and the arrays that they show are looked up once, not at every step;
- ``tolerance``, ``norm``, the quaternion of a rotation matrix and the caging reward are computed on scalars;
- the observation is written into one array;
- ``mj_rnePostConstraint`` is left out, and placing sites before ``mj_forward``, which places them again;
- the hand is moved once in a reset: the package does it twice and forgets what the first time led to;
- the state after a reset is remembered per goal and put back (a reset depends on its goal alone);
- a model is compiled once per process, without what is only there for pictures; its environments take turns in it.

Checked against metaworld 3.1.1 with the v2 rewards, all 50 tasks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import types
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from varshare_rl.envs.sawyer.arithmetic import (
    Quaternion,
    make_caging_reward,
    make_hstack,
    make_norm,
    make_tolerance,
    quaternions_agree,
)
from varshare_rl.envs.sawyer.methods import NamedData, exchange_methods, is_view
from varshare_rl.envs.slots import Array, Episode

CHECKED_VERSION = "3.1.1"
_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)


@functools.cache
def is_supported() -> bool:
    """Return True if the fast path was checked with the installed package; warn once if not."""
    version = importlib.metadata.version("metaworld")
    if version == CHECKED_VERSION and quaternions_agree():
        return True
    reason = f"it was checked with metaworld {CHECKED_VERSION}, this is {version}"
    if version == CHECKED_VERSION:
        reason = "this scipy computes quaternions in another way"
    warnings.warn(
        f"Meta-World runs without its fast path ({reason}): same results, slower; fast=false hides this",
        stacklevel=2,
    )
    return False


@functools.cache
def environment_classes() -> Mapping[str, Any]:
    """Task name -> class of the private, quicker copy."""
    modules = _import_private_copy()
    norm = make_norm()
    numpy = _numpy_with(norm)
    for name, module in modules.items():
        if name.startswith("metaworld.envs.") or name == "metaworld.sawyer_xyz_env":
            module.__dict__["np"] = numpy
        if "Rotation" in module.__dict__:
            module.__dict__["Rotation"] = Quaternion
        if "tolerance" in module.__dict__ and name != "metaworld.utils.reward_utils":
            module.__dict__["tolerance"] = make_tolerance(module.__dict__["tolerance"])
    rewards: Any = modules["metaworld.utils.reward_utils"]
    rewards.tolerance = make_tolerance(rewards.tolerance)
    base = modules["metaworld.sawyer_xyz_env"].__dict__["SawyerXYZEnv"]
    exchange_methods(base)
    base._gripper_caging_reward = make_caging_reward(rewards.tolerance, norm, rewards.hamacher_product)
    classes: Mapping[str, Any] = modules["metaworld.env_dict"].__dict__["ALL_V3_ENVIRONMENTS"]
    return classes


def _import_private_copy() -> dict[str, types.ModuleType]:
    """Import the package's modules again, under the same names but outside ``sys.modules``.

    The package's ``__init__`` is not run: it would register its gymnasium environments twice.
    """

    def take() -> dict[str, types.ModuleType]:
        names = [name for name in sys.modules if name == "metaworld" or name.startswith("metaworld.")]
        return {name: sys.modules.pop(name) for name in names}

    spec = importlib.util.find_spec("metaworld")
    assert spec is not None
    assert spec.origin is not None
    package = types.ModuleType("metaworld")
    package.__path__ = [str(Path(spec.origin).parent)]
    official = take()
    sys.modules["metaworld"] = package
    try:
        base = importlib.import_module("metaworld.sawyer_xyz_env").SawyerXYZEnv
        base._Decorators.assert_task_is_set = lambda method: method  # every task has one here
        importlib.import_module("metaworld.env_dict")
    finally:
        private = take()
        sys.modules.update(official)
    return private


def _numpy_with(norm: Any) -> types.ModuleType:
    """A stand-in for the module ``numpy`` that differs in ``linalg.norm`` and ``hstack`` alone."""

    def stand_in(module: types.ModuleType) -> types.ModuleType:
        made = types.ModuleType(module.__name__)
        made.__dict__.update(module.__dict__)
        return made

    numpy, linalg = stand_in(np), stand_in(np.linalg)
    linalg.__dict__["norm"] = norm
    numpy.__dict__["linalg"] = linalg
    numpy.__dict__["hstack"] = make_hstack()
    return numpy


# --- resets -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Snapshot:
    """An environment right after a reset."""

    obs: Array
    state: Array
    places: tuple[Array, Array]
    attributes: dict[str, Any]


#: (task, horizon, goal) -> the state after a reset, for all environments of this process.
_snapshots: dict[tuple[str, int, bytes], _Snapshot] = {}


def _attributes(env: Any) -> dict[str, Any]:
    """Values that a reset leaves behind in Python. Views into MuJoCo stay: they always show the same."""
    kept: dict[str, Any] = {}
    for name, value in vars(env).items():
        if isinstance(value, np.ndarray) and not is_view(value):
            kept[name] = value.copy()
        elif value is None or isinstance(value, (bool, int, float, np.generic, tuple)):
            kept[name] = value
    return kept


class FastMetaWorldEnv:
    """One Meta-World task on the quicker copy (``varshare_rl.envs.slots.TaskEnv``), with the v2 reward."""

    def __init__(self, name: str, goals: npt.NDArray[np.float64], horizon: int) -> None:
        self._name, self._goals, self._horizon = name, goals, horizon
        self._env = env = environment_classes()[name](reward_function_version="v2")
        self._model = env.shared_model
        self._places = self._model.places
        env.max_path_length = horizon
        env._set_task_called = True
        env._freeze_rand_vec = True
        env._partially_observable = False
        env.action_scale = np.array(env.action_scale, np.float32)  # as a product with float32 actions takes it
        del env.sawyer_observation_space  # computed again, now with the goal's bounds
        self._named_data = NamedData(env.real_data)
        self._was_reset = False

    def reset(self, episode: Episode) -> Array:
        goal = self._goals[episode.choose(len(self._goals))]
        key = (self._name, self._horizon, goal.tobytes())
        if key not in _snapshots or not self._was_reset:
            _snapshots[key] = self._reset_by_simulation(goal)
        else:
            self._put_back(_snapshots[key])
        return _snapshots[key].obs

    def step(self, action: Array) -> tuple[Array, float, bool, bool, bool]:
        self._model.take(self._places)
        obs, reward, terminated, truncated, info = self._env.step(action)
        return obs, float(reward), terminated, truncated, info["success"] == 1.0

    def render(self) -> npt.NDArray[np.uint8]:
        raise NotImplementedError("models are shared here; the package's own environments are rendered")

    def close(self) -> None:
        self._env.close()

    def _reset_by_simulation(self, goal: Array) -> _Snapshot:
        env = self._env
        self._model.put(self._model.places)
        env._last_rand_vec = goal.copy()
        env.data = env.real_data  # resets hand it to MuJoCo's functions
        obs = env.reset()[0]
        env.data = self._named_data
        self._was_reset = True
        self._places = self._model.copy_places()
        state = np.empty(mujoco.mj_stateSize(env.model, _STATE))
        mujoco.mj_getState(env.model, env.real_data, state, _STATE)
        return _Snapshot(obs, state, self._places, _attributes(env))

    def _put_back(self, snapshot: _Snapshot) -> None:
        env = self._env
        mujoco.mj_setState(env.model, env.real_data, snapshot.state, _STATE)
        self._places = snapshot.places
        self._model.put(self._places)
        for name, value in snapshot.attributes.items():
            vars(env)[name] = value.copy() if isinstance(value, np.ndarray) else value
