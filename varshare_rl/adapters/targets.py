"""Finding the linear modules that are to be adapted."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from varshare_rl.errors import UserError


def find_targets(modules: dict[str, nn.Module], wanted: Sequence[str] | str) -> dict[str, nn.Linear]:
    """The modules that ``wanted`` names, by path.

    Raises:
        UserError: a name matches nothing, or something that is no plain linear module.
    """
    found: dict[str, nn.Linear] = {}
    for target in [wanted] if isinstance(wanted, str) else wanted:
        paths = [path for path in modules if path and _is_target(path, target, isinstance(wanted, str))]
        if not paths:
            linear = listed([path for path, module in modules.items() if path and type(module) is nn.Linear])
            raise UserError(f"target_modules: {target!r} matches nothing; linear modules are {linear or 'none'}")
        for path in paths:
            module = modules[path]
            if type(module) is not nn.Linear:
                raise UserError(
                    f"target_modules: {target!r} matches {path}, a {type(module).__name__}; "
                    "only plain nn.Linear can be adapted"
                )
            found[path] = module
    if not found:
        raise UserError("target_modules is empty; name at least one linear module")
    for module in found.values():
        places = [other for other, same in modules.items() if same is module]
        if len(places) > 1:
            raise UserError(f"target_modules: {listed(places)} are one and the same module; it cannot be adapted")
    return found


def _is_target(path: str, target: str, is_pattern: bool) -> bool:
    if not is_pattern:
        return path == target or path.endswith(f".{target}")
    try:
        return re.fullmatch(target, path) is not None
    except re.error as error:
        raise UserError(f"target_modules is no regular expression: {target!r} ({error})") from error


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names with commas, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
