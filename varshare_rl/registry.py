"""Components by group and name: each registers its config class in its own file, and nothing else lists them.

A component is a dataclass of options with a method ``build``, under ``@register(<group>, <name>)``, and is chosen
with ``<group>=<name>``. In groups whose options are stored, it has a field ``name`` with that name.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from varshare_rl.errors import UserError

#: Where the components of every group are: packages or modules below this one.
ROOMS: dict[str, tuple[str, ...]] = {
    "command": ("config", "continual.config"),
    "env": ("envs",),
    "algorithm": ("algorithms",),
    "network": ("nn",),
    "elbo/schedule": ("optim",),
    "elbo/prior": ("optim",),
    "gradient": ("optim",),
    "method": ("transfer.methods",),
    "report": ("commands",),
    "tracker": ("run.trackers",),
}
#: Installed packages name modules to be imported as plugins under this group of entry points.
ENTRY_POINTS = "varshare_rl.plugins"

_components: dict[str, dict[str, type[Any]]] = {group: {} for group in ROOMS}

C = TypeVar("C")


def register(group: str, name: str) -> Callable[[type[C]], type[C]]:
    """Make a config class known as ``name`` of a group.

    Raises:
        UserError: there is no such group, the name is taken, or the class has another ``name``.
    """
    if group not in ROOMS:
        raise UserError(f"unknown group {group!r} of components; there are {', '.join(ROOMS)}")

    def put(config: type[C]) -> type[C]:
        known = _components[group].get(name, config)
        place, taken = (f"{made.__module__}.{made.__qualname__}" for made in (config, known))
        if place != taken:
            raise UserError(f"{group}={name} is {taken} and {place}; give the second another name")
        own = next((field.default for field in fields(config) if field.name == "name"), MISSING)  # type: ignore[arg-type]
        if own not in (MISSING, name):
            raise UserError(f"{place} is registered as {group}={name} with name = {own!r}; give it one name")
        _components[group][name] = config
        return config

    return put


def registered(group: str) -> dict[str, type[Any]]:
    """The config classes of a group by name, in the order of names; those of this package are imported first."""
    discover(group)
    return dict(sorted(_components[group].items()))


def lookup(group: str, name: str) -> type[Any]:
    """The config class of a name.

    Raises:
        UserError: there is none; says which there are.
    """
    known = registered(group)
    if name not in known:
        raise UserError(f"unknown {group} {name!r}; choose {', '.join(known)}, or load the plugin that has it")
    return known[name]


@cache
def discover(group: str) -> None:
    """Import the modules that hold a group's components."""
    for room in ROOMS[group]:
        module = importlib.import_module(f"{__package__}.{room}")
        for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
            if not found.ispkg:
                importlib.import_module(f"{module.__name__}.{found.name}")


def load_plugins(names: Sequence[str]) -> None:
    """Import modules of the user, from the current folder too, so that they register what they have.

    Raises:
        UserError: a module is missing, or fails.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        _import(name, f"plugins=[{name}]")


@cache
def load_installed_plugins() -> None:
    """Import what installed packages name as plugins. Raises UserError if one fails."""
    for entry in entry_points(group=ENTRY_POINTS):
        _import(entry.module, f"the installed plugin {entry.name} ({entry.module})")


def require_plugins(names: Sequence[str], run: object) -> None:
    """Raise UserError if modules that a run was made with are not imported: a folder alone does not run code."""
    if any(name not in sys.modules or name in sys.stdlib_module_names for name in names):
        given = f"plugins=[{','.join(names)}]"
        raise UserError(
            f"{run} was made with modules that run code of their own; if you trust them, give {given} to load them"
        )


def _import(name: str, words: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise UserError(
                f"{words}: there is no module {name} here or installed; give one that there is"
            ) from error
        raise UserError(f"{words} cannot be imported: {type(error).__name__}: {error}") from error
