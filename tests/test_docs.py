"""The documentation names every option of a training run, and no other."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import envs
from varshare_rl.config import COMPONENTS, TrainConfig

DOCS = Path(envs.__file__).resolve().parent.parent / "docs"


def keys(options: object, prefix: str) -> set[str]:
    """Dotted names of all options that can be set, names of components left out."""
    found: set[str] = set()
    for option in fields(options):  # type: ignore[arg-type]
        value = getattr(options, option.name)
        name = f"{prefix}{option.name}"
        if is_dataclass(value):
            found |= keys(value, f"{name}.")
        elif option.name != "name" and name not in ("env", "algorithm", "network"):
            found.add(name)
    return found


def test_configuration_md_has_every_key_once() -> None:
    expected = keys(TrainConfig(env=None, algorithm=None, network=None), "")
    for group, components in COMPONENTS.items():
        for options in components.values():
            expected |= keys(options(), f"{group.replace('/', '.')}.")
    text = (DOCS / "configuration.md").read_text().partition("## `python -m varshare_rl.evaluate`")[0]
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    named = [key for row in rows for key in re.findall(r"`([\w.]+)`", row)]
    single = text.partition("`network.rank`, `network.alpha`")[2].partition("belong to single")[0]
    named += ["network.rank", "network.alpha", *re.findall(r"`(network\.\w+)`", single)]
    assert sorted(named) == sorted(expected)
