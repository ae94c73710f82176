"""Quicker methods for Meta-World's environments, named as in the package, with the same results bit for bit.

They belong to the private copy that ``envs.sawyer.fast`` makes; its docstring says what they leave out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import mujoco
import numpy as np
from mujoco import mj_forward, mj_step
from numpy._core import umath

from varshare_rl.envs.slots import Array

_UPRIGHT = np.array([1.0, 0.0, 1.0, 0.0])
_MINUS_ONE, _ONE, _HALF = np.array(-1, np.float32), np.array(1, np.float32), np.array(0.5)
_clip = umath.clip  # type: ignore[attr-defined]  # what ``ndarray.clip`` calls in the end


# --- views into MuJoCo's memory, looked up once: they always show its present content ----------------------


def is_view(array: Array) -> bool:
    """Return True if an array lives in memory of MuJoCo, not numpy's."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base is not None


class _Views:
    """Stands for an accessor by name: what it shows of MuJoCo's memory is looked up once.

    Arrays that are views into that memory always show its present content; they are kept. So are the ids.
    """

    def __init__(self, accessor: Any) -> None:
        self._accessor = accessor

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._accessor, name)
        if isinstance(value, int) or (isinstance(value, np.ndarray) and is_view(value)):
            self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_accessor":
            self.__dict__[name] = value
        else:
            setattr(self._accessor, name, value)


class NamedData:
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
class StepViews:
    """Everything that a step reads and writes, as views into MuJoCo's memory."""

    mocap_pos: Array  # [3]
    mocap_quat: Array  # [4]
    ctrl: Array  # [2]
    hand: Array  # [3], as all below
    right_claw: Array
    left_claw: Array
    right_finger: Array
    left_finger: Array

    @staticmethod
    def of(data: Any) -> StepViews:
        bodies = (data.body(name).xpos for name in ("hand", "rightclaw", "leftclaw"))
        sites = (data.site(name).xpos for name in ("rightEndEffector", "leftEndEffector"))
        return StepViews(data.mocap_pos[0], data.mocap_quat[0], data.ctrl, *bodies, *sites)


# --- one model per file ---------------------------------------------------------------------------------------


def touchable(path: str) -> Any:
    """Compile a model without what is only there for pictures: shapes that touch nothing, cameras, lights.

    MuJoCo places each of them at every substep, and clears a flag for every one of their meshes' 100 000 triangles.
    Shapes with a name stay, for the package asks for their places. The dynamics are those of the whole model.
    """
    spec = mujoco.MjSpec.from_file(path)
    shapes = [geom for geom in spec.geoms if not (geom.name or geom.contype or geom.conaffinity)]
    for part in (*shapes, *spec.cameras, *spec.lights):
        part.delete()
    meshes = {geom.meshname for geom in spec.geoms}
    for mesh in [mesh for mesh in spec.meshes if mesh.name not in meshes]:
        mesh.delete()
    return spec.compile()


class _SharedModel:
    """A compiled model for all environments of this process that use its file.

    Resets move bodies and sites in the model, so an environment puts its own places in before it works.
    """

    def __init__(self, path: str) -> None:
        self.model = touchable(path)
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


# --- the methods ---------------------------------------------------------------------------------------------


def _initialize_simulation(self: Any) -> tuple[Any, Any]:
    self.shared_model = _shared_model(self.fullpath)
    self.shared_model.put(self.shared_model.places)
    model = self.shared_model.model
    size = model.vis.global_
    size.offwidth, size.offheight = max(size.offwidth, self.width), max(size.offheight, self.height)
    self.real_data = mujoco.MjData(model)
    self.step_views = StepViews.of(self.real_data)
    self.simulates = True
    return model, self.real_data


def reset(self: Any, *, seed: None = None, config: None = None) -> tuple[Array, dict[str, Any]]:
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


def exchange_methods(base: Any) -> None:
    """Give ``SawyerXYZEnv`` of the private copy the methods of this module."""
    for method in (
        _initialize_simulation,
        reset,
        do_simulation,
        _reset_hand,
        _get_curr_obs_combined_no_goal,
        touching_object,
        step,
    ):
        setattr(base, method.__name__, method)
    base.tcp_center = property(_tcp_center)
