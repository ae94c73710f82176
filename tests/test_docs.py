"""The documentation names every option of a training run, and no other."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import varshare_rl
from varshare_rl.config import COMPONENTS, TrainConfig
from varshare_rl.continual.config import METHODS, blank_continual_config

DOCS = Path(varshare_rl.__file__).resolve().parent.parent / "docs"


def keys(options: object, prefix: str, of: type | None = None) -> set[str]:
    """Dotted names of all options that can be set, names of components left out; ``of``: those of this class."""
    found: set[str] = set()
    for option in fields(of or options):  # type: ignore[arg-type]
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


def test_continual_md_has_every_key_of_its_own_once() -> None:
    expected = keys(blank_continual_config(), "") - keys(blank_continual_config(), "", TrainConfig)
    for options, _ in METHODS.values():
        expected |= keys(options(), "method.")
    expected = (expected - {"pretrained", "method"}) | {"from"}
    text = (DOCS / "continual.md").read_text().partition("## Options")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    named = [key for row in rows for key in re.findall(r"`([\w.]+)`", row)]
    assert sorted(named) == sorted(expected)
