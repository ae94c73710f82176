"""Views into MuJoCo's memory, looked up once: they always show its present content."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from varshare_rl.envs.slots import Array


def is_view(array: Array) -> bool:
    """Whether an array lives in memory of MuJoCo, not numpy's."""
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
    def of(data: Any) -> StepViews:
        bodies = (data.body(name).xpos for name in ("hand", "rightclaw", "leftclaw"))
        sites = (data.site(name).xpos for name in ("rightEndEffector", "leftEndEffector"))
        return StepViews(data.mocap_pos[0], data.mocap_quat[0], data.ctrl, *bodies, *sites)
