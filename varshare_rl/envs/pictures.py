"""Pictures of MuJoCo's environments without a screen."""

from __future__ import annotations

import os
from ctypes.util import find_library
from typing import Any

from varshare_rl.errors import UserError

#: Values of MUJOCO_GL that need no screen, with the library of each and Debian's package of that.
LIBRARIES = {"osmesa": ("OSMesa", "libosmesa6"), "egl": ("EGL", "libegl1")}


def choose_gl(needed: bool = True) -> None:
    """Choose what MuJoCo draws with where MUJOCO_GL does not say it and there is no screen.

    Raises:
        UserError: the library is not there; names the package of the system.
    """
    chosen = os.environ.get("MUJOCO_GL", "")
    if chosen and chosen not in LIBRARIES:
        return
    if not chosen and os.environ.get("DISPLAY"):
        return
    for name in [chosen] if chosen else LIBRARIES:
        if find_library(LIBRARIES[name][0]):
            os.environ["MUJOCO_GL"] = name
            return
    if not needed:
        return
    given = f"MUJOCO_GL={chosen}" if chosen else "there is no screen, and MuJoCo"
    packages = LIBRARIES[chosen][1] if chosen else " or ".join(package for _, package in LIBRARIES.values())
    raise UserError(f"{given} needs a library that is not here to draw with: apt-get install {packages}")


def render(env: Any) -> Any:
    """Render an environment; one of MuJoCo's in its own context, which it leaves to the last one that was made."""
    viewer = getattr(getattr(env.unwrapped, "mujoco_renderer", None), "viewer", None)
    if viewer is not None:
        viewer.make_context_current()
    return env.render()
