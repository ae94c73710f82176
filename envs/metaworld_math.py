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
_LONG_TAIL_SCALE = np.sqrt(1 / _VALUE_AT_MARGIN - 1)
_GAUSSIAN_SCALE = np.sqrt(-2 * np.log(_VALUE_AT_MARGIN))


def make_norm() -> Callable[..., Any]:
    """``numpy.linalg.norm``, quicker for one float64 vector or number."""
    full, sqrt, float64, ndarray = np.linalg.norm, np.sqrt, np.float64, np.ndarray
    dtype = np.dtype(np.float64)

    def norm(x: Any, *args: Any, **kwargs: Any) -> Any:
        if type(x) is ndarray and x.dtype is dtype and x.strides == (8,) and not args and not kwargs:
            return sqrt(x.dot(x))
        if type(x) is float64 and not args and not kwargs:
            return sqrt(x * x)
        return full(x, *args, **kwargs)

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
    floats = (float, np.float64)

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
        if lower <= x <= upper:
            return 1.0
        distance = float64((lower - x if x < lower else x - upper) / margin)
        if sigmoid == "long_tail":
            return float(1 / ((distance * _LONG_TAIL_SCALE) ** 2 + 1))
        if sigmoid == "gaussian":
            return float(exp(-0.5 * (distance * _GAUSSIAN_SCALE) ** 2))
        return full(x, bounds, margin, sigmoid, value_at_margin)

    return tolerance


class Quaternion:
    """What ``Rotation.from_matrix(m).as_quat()`` computes for an orthonormal 3 x 3 matrix.

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
        trace = m[0][0] + m[1][1] + m[2][2]
        candidates = (m[0][0], m[1][1], m[2][2], trace)
        i = candidates.index(max(candidates))
        if i == 3:
            q = [m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1], 1 + trace]
        else:
            j, k = (i + 1) % 3, (i + 2) % 3
            q = [0.0, 0.0, 0.0, m[k][j] - m[j][k]]
            q[i] = 1 - trace + 2 * m[i][i]
            q[j] = m[j][i] + m[i][j]
            q[k] = m[k][i] + m[i][k]
        norm = sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3])
        return np.array([q[0] / norm, q[1] / norm, q[2] / norm, q[3] / norm])


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
