"""The arithmetic of Meta-World's observations and rewards on scalars, with the same bits as the package's."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

Array = npt.NDArray[Any]
_VALUE_AT_MARGIN = 0.1  # the default of the package's ``tolerance``
_LONG_TAIL_SCALE = float(np.sqrt(1 / _VALUE_AT_MARGIN - 1))
_GAUSSIAN_SCALE = float(np.sqrt(-2 * np.log(_VALUE_AT_MARGIN)))


def make_norm() -> Callable[..., Any]:
    """``numpy.linalg.norm``, quicker for the Euclidean norm of one float64 vector or number."""
    full, root, float64, ndarray = np.linalg.norm, sqrt, np.float64, np.ndarray
    dtype = np.dtype(np.float64)

    def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
        if (ord is None or ord == 2) and axis is None and not keepdims:
            if type(x) is ndarray and x.dtype is dtype and x.strides == (8,):
                return float64(root(x.dot(x)))
            if type(x) is float64 and ord is None:
                return float64(root(x * x))
        return full(x, ord, axis, keepdims)

    return norm


def make_hstack() -> Callable[..., Any]:
    """``numpy.hstack``, quicker for float64 numbers."""
    full, float64, array = np.hstack, np.float64, np.array

    def hstack(parts: Any, **kwargs: Any) -> Any:
        if type(parts) is tuple and not kwargs and all(type(part) is float64 for part in parts):
            return array(parts)
        return full(parts, **kwargs)

    return hstack


def make_tolerance(full: Callable[..., Any]) -> Callable[..., Any]:
    """The package's ``tolerance`` (``full``), quicker for float64 numbers and its usual sigmoids."""
    float64, exp = np.float64, np.exp
    floats = frozenset((float, np.float64))

    def tolerance(
        x: Any,
        bounds: tuple[Any, Any] = (0.0, 0.0),
        margin: Any = 0.0,
        sigmoid: str = "gaussian",
        value_at_margin: float = _VALUE_AT_MARGIN,
    ) -> Any:
        lower, upper = bounds
        if (
            type(x) not in floats
            or type(margin) not in floats
            or not margin > 0
            or not lower <= upper
            or value_at_margin != _VALUE_AT_MARGIN
        ):
            return full(x, bounds, margin, sigmoid, value_at_margin)
        value = float(x)
        if lower <= value <= upper:
            return 1.0
        distance = float(lower - value if value < lower else value - upper) / float(margin)
        try:
            if sigmoid == "long_tail":
                return 1 / ((distance * _LONG_TAIL_SCALE) ** 2 + 1)
            if sigmoid == "gaussian":
                return float(exp(float64(-0.5 * (distance * _GAUSSIAN_SCALE) ** 2)))
        except OverflowError:  # where numpy goes on with infinity
            pass
        return full(x, bounds, margin, sigmoid, value_at_margin)

    return tolerance


def make_caging_reward(
    tolerance: Callable[..., Any], norm: Callable[..., Any], hamacher_product: Callable[..., Any]
) -> Callable[..., Any]:
    """The package's ``_gripper_caging_reward`` of all tasks that have none of their own, on scalars.

    How well the pads hold the object along y and the fingers reach it in the xz-plane, from 0 to 1.
    """
    xz = slice(0, 3, 2)

    def _gripper_caging_reward(
        self: Any,
        action: Array,
        obj_pos: Array,
        obj_radius: float,
        pad_success_thresh: float,
        object_reach_radius: float,
        xz_thresh: float,
        desired_gripper_effort: float = 1.0,
        high_density: bool = False,
        medium_density: bool = False,
    ) -> Any:
        if high_density and medium_density:
            raise ValueError("high_density and medium_density exclude each other")
        obj_start, tcp_start, tcp = self.obj_init_pos, self.init_tcp, self.tcp_center
        y, y_start = obj_pos[1], obj_start[1]
        sides = (
            tolerance(
                abs(pad - y),
                (obj_radius, pad_success_thresh),
                abs(abs(pad - y_start) - pad_success_thresh),
                "long_tail",
            )
            for pad in (self.get_body_com("leftpad")[1], self.get_body_com("rightpad")[1])
        )
        margin = norm(obj_start[xz] - tcp_start[xz]) - xz_thresh
        plane = tolerance(norm(tcp[xz] - obj_pos[xz]), (0, xz_thresh), margin, "long_tail")
        caging = hamacher_product(hamacher_product(*sides), float(plane))
        closed = min(max(0, action[-1]), desired_gripper_effort) / desired_gripper_effort
        result = hamacher_product(caging, closed if caging > 0.97 else 0.0)
        if high_density:
            return (result + caging) / 2
        if medium_density:
            margin = abs(norm(obj_start - tcp_start) - object_reach_radius)
            reach = tolerance(norm(obj_pos - tcp), (0, object_reach_radius), margin, "long_tail")
            return (result + float(reach)) / 2
        return result

    return _gripper_caging_reward


class Quaternion:
    """The quaternion that ``Rotation.from_matrix(m).as_quat()`` computes for an orthonormal 3 x 3 matrix.

    Shuster, "A survey of attitude representations" (1993), by the largest of the four candidates, in the
    order of operations that scipy uses; the matrices that MuJoCo gives need no check.
    """

    def __init__(self, matrix: Array) -> None:
        self._matrix = matrix

    @staticmethod
    def from_matrix(matrix: Array) -> Quaternion:
        """Take the matrix, ``[3, 3]``; not checked."""
        return Quaternion(matrix)

    def as_quat(self) -> Array:
        """The unit quaternion (x, y, z, w)."""
        m = self._matrix.tolist()
        (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = m
        trace = xx + yy + zz
        if trace > xx and trace > yy and trace > zz:
            x, y, z, w = zy - yz, xz - zx, yx - xy, 1 + trace
        else:
            diagonal = (xx, yy, zz)
            i = diagonal.index(max(diagonal))
            j, k = (i + 1) % 3, (i + 2) % 3
            q = [0.0, 0.0, 0.0]
            q[i] = 1 - trace + 2 * m[i][i]
            q[j] = m[j][i] + m[i][j]
            q[k] = m[k][i] + m[i][k]
            (x, y, z), w = q, m[k][j] - m[j][k]
        norm = sqrt(x * x + y * y + z * z + w * w)
        return np.array((x / norm, y / norm, z / norm, w / norm))


def quaternions_agree() -> bool:
    """Compare with scipy, whose operations a build may order or fuse in another way."""
    rng = np.random.default_rng(0)
    matrix = np.empty(9)
    for quaternion in rng.normal(size=(100, 4)):
        mujoco.mju_quat2Mat(matrix, quaternion / np.linalg.norm(quaternion))
        m = matrix.reshape(3, 3)
        if not np.array_equal(Quaternion.from_matrix(m).as_quat(), Rotation.from_matrix(m).as_quat()):
            return False
    return True
