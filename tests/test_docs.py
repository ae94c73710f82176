"""The reference of options is what the config classes say, and every option says something."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import varshare_rl

DOCS = Path(varshare_rl.__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["generate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_configuration_md_is_up_to_date(generate: ModuleType) -> None:
    written = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert written == generate.page(), "renew it with python docs/generate.py"


def test_every_option_has_a_sentence(generate: ModuleType) -> None:
    rows = [line for line in generate.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    silent = [row for row in rows if row.split(" | ")[-1].strip(" |") == ""]
    assert silent == []
