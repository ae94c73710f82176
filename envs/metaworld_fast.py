"""The package's environments with the same results, bit for bit, in less than half the time.

A second, private copy of the package's environment modules is imported, and a few of its functions are
exchanged for quicker ones that do the same arithmetic in the same order; the package that everyone else
imports stays untouched. Nothing here is specific to a task:

- MuJoCo's accessors by name and the arrays that they show are looked up once, not at every step;
- ``tolerance``, ``norm`` and the quaternion of a rotation matrix are computed on scalars;
- the observation is written into one array;
- ``mj_rnePostConstraint`` is left out, and placing sites before ``mj_forward``, which places them again;
- the state after a reset is remembered per goal and put back (a reset depends on its goal alone);
- a model is compiled once per process; its environments take turns in it.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
from mujoco import mj_forward, mj_step
from numpy._core import umath

from envs.metaworld_math import (
    Quaternion,
    make_caging_reward,
    make_hstack,
    make_norm,
    make_tolerance,
    quaternions_agree,
)
from envs.slots import Array, Episode

CHECKED_VERSION = "3.1.1"
_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
_UPRIGHT = np.array([1.0, 0.0, 1.0, 0.0])
_MINUS_ONE, _ONE, _HALF = np.array(-1, np.float32), np.array(1, np.float32), np.array(0.5)
_clip = umath.clip  # type: ignore[attr-defined]  # what ``ndarray.clip`` calls in the end


@functools.cache
def is_supported() -> bool:
    """Whether the fast path was checked with the installed package; warns once if not."""
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
    for function in (
        _initialize_simulation,
        reset,
        do_simulation,
        _reset_hand,
        _get_curr_obs_combined_no_goal,
        touching_object,
        step,
        make_caging_reward(rewards.tolerance, norm, rewards.hamacher_product),
    ):
        setattr(base, function.__name__, function)
    base.tcp_center = property(_tcp_center)
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


class _Views:
    """Stands for an accessor by name: what it shows of MuJoCo's memory is looked up once.

    Arrays that are views into that memory always show its present content; they are kept. So are the ids.
    """

    def __init__(self, accessor: Any) -> None:
        self._accessor = accessor

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._accessor, name)
        if isinstance(value, int) or (isinstance(value, np.ndarray) and _is_view(value)):
            self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_accessor":
            self.__dict__[name] = value
        else:
            setattr(self._accessor, name, value)


class _NamedData:
    """Stands for ``MjData`` while stepping: accessors by name are made once."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self.body, self.site, self.geom, self.joint = (
            functools.cache(_viewing(accessor)) for accessor in (data.body, data.site, data.geom, data.joint)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


def _viewing(accessor: Callable[..., Any]) -> Callable[..., _Views]:
    return lambda *name: _Views(accessor(*name))


@dataclass(frozen=True)
class _StepViews:
    """What every step reads and writes, as views into MuJoCo's memory."""

    mocap_pos: Array  # [3]
    mocap_quat: Array  # [4]
    ctrl: Array  # [2]
    hand: Array  # [3], as all below
    right_claw: Array
    left_claw: Array
    right_finger: Array
    left_finger: Array

    @staticmethod
    def of(data: Any) -> _StepViews:
        bodies = (data.body(name).xpos for name in ("hand", "rightclaw", "leftclaw"))
        sites = (data.site(name).xpos for name in ("rightEndEffector", "leftEndEffector"))
        return _StepViews(data.mocap_pos[0], data.mocap_quat[0], data.ctrl, *bodies, *sites)


class _SharedModel:
    """A compiled model (20 MB) for all environments of this process that use its file.

    Resets move bodies and sites in the model, so an environment puts its own places in before it works.
    """

    def __init__(self, path: str) -> None:
        self.model = mujoco.MjModel.from_xml_path(path)
        self.places = self.copy_places()  # as compiled
        self._current = self.places

    def copy_places(self) -> tuple[Array, Array]:
        return self.model.body_pos.copy(), self.model.site_pos.copy()

    def take(self, places: tuple[Array, Array]) -> None:
        """Put ``places`` in unless they were the last ones to be put in."""
        if self._current is not places:
            self.put(places)

    def put(self, places: tuple[Array, Array]) -> None:
        self._current = places
        self.model.body_pos[:], self.model.site_pos[:] = places


_shared_model = functools.cache(_SharedModel)


def forget_models() -> None:
    """Let go of compiled models that no environment of this process uses."""
    _shared_model.cache_clear()


# --- methods of the private copy (named as in the package) --------------------------------------------------


def _initialize_simulation(self: Any) -> tuple[Any, Any]:
    self.shared_model = _shared_model(self.fullpath)
    self.shared_model.put(self.shared_model.places)
    model = self.shared_model.model
    size = model.vis.global_
    size.offwidth, size.offheight = max(size.offwidth, self.width), max(size.offheight, self.height)
    self.real_data = mujoco.MjData(model)
    self.step_views = _StepViews.of(self.real_data)
    self.simulates = True
    return model, self.real_data


def reset(self: Any, *, seed: None = None, options: None = None) -> tuple[Array, dict[str, Any]]:
    """The package resets twice and throws away what MuJoCo computes for the first; the places are kept."""
    self.curr_path_length = 0
    self.simulates = False
    self.reset_model()
    self.simulates = True
    mujoco.mj_resetData(self.model, self.real_data)
    obs = self.reset_model()
    self._prev_obs = obs[:18].copy()
    obs[18:36] = self._prev_obs
    return obs, {}


def do_simulation(self: Any, ctrl: Any, n_frames: int) -> None:
    if self.simulates:
        self.real_data.ctrl[:] = ctrl
        mj_step(self.model, self.real_data, n_frames)


def _reset_hand(self: Any, steps: int = 50) -> None:
    views = self.step_views
    views.mocap_pos[:], views.mocap_quat[:] = self.hand_init_pos, _UPRIGHT
    self.do_simulation((-1, 1), steps * self.frame_skip)
    self.init_tcp = self.tcp_center


def _get_curr_obs_combined_no_goal(self: Any) -> Array:
    views = self.step_views
    obs = np.zeros(18)
    obs[:3] = views.hand
    apart = views.right_claw - views.left_claw
    obs[3] = min(sqrt(apart.dot(apart)) / 0.1, 1.0)
    position, quaternion = self._get_pos_objects(), self._get_quat_objects()
    if len(position) == 3:
        obs[4:7], obs[7:11] = position, quaternion
    else:
        obs[4:7], obs[7:11], obs[11:14], obs[14:] = position[:3], quaternion[:4], position[3:], quaternion[4:]
    return obs


def _tcp_center(self: Any) -> Array:
    views = self.step_views
    center: Array = (views.right_finger + views.left_finger) * _HALF
    return center


def touching_object(self: Any, object_geom_id: int) -> bool:
    data, named = self.real_data, self.data
    contact = data.contact
    left, right = named.geom("leftpad_geom").id, named.geom("rightpad_geom").id
    left_force = right_force = 0.0
    for i, pair in enumerate(contact.geom.tolist()):
        if object_geom_id in pair:
            force = data.efc_force[contact.efc_address[i]]
            if left in pair:
                left_force += force
            if right in pair:
                right_force += force
    return bool(left_force > 0 and right_force > 0)


def step(self: Any, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
    model, data, views = self.model, self.real_data, self.step_views
    position, ctrl = views.mocap_pos, views.ctrl
    position += _clip(action[:3], _MINUS_ONE, _ONE) * self.action_scale
    _clip(position, self.mocap_low, self.mocap_high, position)
    views.mocap_quat[:] = _UPRIGHT
    if self.curr_path_length >= self.max_path_length:
        raise ValueError("the episode is over: reset first")
    ctrl[0] = grip = action[3]
    ctrl[1] = -grip
    mj_step(model, data, self.frame_skip)
    self.curr_path_length += 1
    mj_forward(model, data)
    current = self._get_curr_obs_combined_no_goal()
    obs = np.empty(39)
    obs[:18], obs[18:36], obs[36:] = current, self._prev_obs, self._get_pos_goal()
    self._prev_obs = current
    space = self.sawyer_observation_space
    _clip(obs, space.low, space.high, obs)
    reward, info = self.evaluate_state(obs, action)
    return obs, reward, False, self.curr_path_length == self.max_path_length, info


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


def _is_view(array: Array) -> bool:
    """Whether an array lives in memory of MuJoCo, not numpy's."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base is not None


def _attributes(env: Any) -> dict[str, Any]:
    """What a reset leaves behind in Python. Views into MuJoCo stay as they are: they always show the same."""
    kept: dict[str, Any] = {}
    for name, value in vars(env).items():
        if isinstance(value, np.ndarray) and not _is_view(value):
            kept[name] = value.copy()
        elif value is None or isinstance(value, (bool, int, float, np.generic, tuple)):
            kept[name] = value
    return kept


class FastMetaWorldEnv:
    """One Meta-World task on the quicker copy (``envs.slots.TaskEnv``), with the v2 reward."""

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
        self._named_data = _NamedData(env.real_data)
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
