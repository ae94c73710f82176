"""The words of a command line, read strictly: what nothing reads, or would be read in another way, is refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from varshare_rl.errors import UserError

#: Flags that show something instead of running, and whether a word follows: True, False, or one of a few.
_SHOWING: dict[str, bool | tuple[str, ...]] = {
    **dict.fromkeys(("--package", "-p"), True),
    **dict.fromkeys(("--resolve", "--hydra-help", "--version", "--shell-completion", "-sc"), False),
    **dict.fromkeys(("--info", "-i"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
}
#: What ``--cfg`` shows.
_SHOWN = ("job", "hydra", "all")
#: A number with a point or an exponent, outside of words.
_DECIMAL = re.compile(r"(?<![\w.+-])[+-]?(?:\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(?![\w.])")


@dataclass
class Words:
    """A command line: its overrides, whether it is a sweep, and flags that show something instead of running."""

    overrides: list[str] = field(default_factory=list)
    multirun: bool = False
    showing: list[str] = field(default_factory=list)


def read_words(arguments: Sequence[str]) -> Words:
    """Part overrides and flags.

    Raises:
        UserError: a flag is unknown, or lacks its word.
    """
    words, left = Words(), iter(arguments)
    for item in left:
        flag, equals, value = item.partition("=")
        if not item.startswith("-"):
            if item.lower() == "hydra.mode=multirun":
                words.multirun = True
            else:
                words.overrides.append(item)
        elif item in ("-m", "--multirun"):
            words.multirun = True
        elif flag in ("--config-dir", "-cd"):
            given = value if equals else next(left, "")
            folder = Path(given).absolute()
            if not given or not folder.is_dir():
                raise UserError(f"{flag} {given!r} is no folder; give one with configurations of yours")
            words.overrides.append(f"hydra.searchpath=['file://{folder}']")
        elif flag in ("--cfg", "-c"):
            shown = value if equals else next(left, "")
            if shown not in _SHOWN:
                raise UserError(f"{flag} {shown!r} shows nothing; give one of {', '.join(_SHOWN)}")
            words.showing += ["--cfg", shown]
        elif flag in _SHOWING:
            following = _SHOWING[flag]
            if equals and isinstance(following, tuple) and value not in following:
                raise UserError(f"{flag} {value!r} shows nothing; give one of {', '.join(following)}")
            words.showing.append(item)
            if not equals and following is True:
                words.showing.append(next(left, ""))
            elif isinstance(following, tuple):
                words.showing += _one_of(following, arguments, item)
        elif item not in ("-r", "--run"):
            bare = item.lstrip("-")
            cure = f"write {bare}" if "=" in bare else "options are written name=value"
            raise UserError(f"unknown flag {item}; {cure}, --help says more")
    words.overrides = [item for item in words.overrides if item not in words.showing]
    if words.multirun and words.showing:
        raise UserError(f"{words.showing[0]} shows one configuration, and -m is for many; leave out one of them")
    return words


def is_folder(path: str) -> bool:
    """Return True for a folder that is there; what no folder can be called is none."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def _one_of(choices: tuple[str, ...], arguments: Sequence[str], flag: str) -> list[str]:
    following = arguments[arguments.index(flag) + 1 :]
    return list(following[:1]) if following and following[0] in choices else []


def parse(
    overrides: Sequence[str], groups: Collection[str] = (), loader: ConfigLoader | None = None
) -> list[Override]:
    """Parse overrides and refuse those of which one would silently win, or that take something away.

    A ``loader`` knows what there is to be swept with ``glob``.

    Raises:
        UserError: a word is no option, an option is given twice or taken away, or a choice of one of the ``groups``
            is a path.
        HydraException: one cannot be parsed.
    """
    for item in overrides:
        if "=" not in item and not item.startswith("~"):
            folder = f", such as run={item}" if Path(item).is_dir() else ""
            raise UserError(f"{item!r} is no option; options are written name=value{folder}")
    found: dict[str, str] = {}
    parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
    for item, override in zip(overrides, parsed, strict=True):
        key = override.key_or_group if override.package is None else f"{override.key_or_group}@{override.package}"
        if override.is_delete():
            raise UserError(f"{item} takes an option away, and all are needed; leave it out, or give it a value")
        if key in found:
            raise UserError(f"{key} is given twice, {found[key]} and {item}; give it once")
        found[key] = item
        if key in groups:
            for part in re.split(r"[/,\[\]]", item.partition("=")[2]):
                if part in (".", ".."):
                    raise UserError(f"{item} is a path; {key} takes a name")
    return parsed


def check_composed(composed: DictConfig, overrides: Sequence[Override]) -> None:
    """Refuse keys that no config class has, and the name of a component changed without its options.

    Raises:
        UserError: in the words in which a key that is not there is refused.
    """
    for key, kind in _unknown(composed, ""):
        names = ", ".join(option.name for option in fields(kind))
        last = key.rpartition(".")[2]
        raise UserError(
            f"Could not override '{key}'. Key '{last}' not in '{kind.__name__}' (its options are {names})"
        )
    for override in overrides:
        parent, _, key = override.key_or_group.rpartition(".")
        if key == "name" and parent and not parent.startswith("hydra"):
            node = OmegaConf.select(composed, parent)
            if is_dataclass(_type(node)):
                value = override.get_value_element_as_str()
                group = parent.replace(".", "/")
                raise UserError(
                    f"{parent}.name={value} would keep the options of another choice; write {group}={value}"
                )


def _unknown(config: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
    """Keys of structured nodes that their classes do not have, with the class."""
    kind = _type(config)
    known = {option.name for option in fields(kind)} if is_dataclass(kind) else None
    for key in map(str, config):
        if known is not None and key not in known:
            yield f"{prefix}{key!s}", kind
        elif not OmegaConf.is_missing(config, key):
            node = config._get_node(key)
            if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
                yield from _unknown(node, f"{prefix}{key!s}.")


def _type(node: Any) -> Any:
    return OmegaConf.get_type(node) if isinstance(node, DictConfig) else None


def whole_numbers(override: str) -> str:
    """Return an override with numbers such as ``1e6`` and ``64.0`` as integers, where they are; quotes stay."""
    name, equals, value = override.partition("=")
    if "'" in value or '"' in value:
        return override

    def whole(match: re.Match[str]) -> str:
        number = float(match[0])
        return str(int(number)) if number.is_integer() else match[0]

    return name + equals + _DECIMAL.sub(whole, value)
