"""The examples run, with a tiny budget, and are short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import varshare_rl

PROJECT = Path(varshare_rl.__file__).resolve().parent.parent
#: Budget, and what must be on the screen.
EXAMPLES = {
    "own_environments": ("1600", ("at 0: {'left': array", "success: {'left'")),
    "compare_networks": ("16000", ("shared: success", "varshare_lora: success", "nats:", "clusters:")),
    "adapters": ("3", ("sum: loss", "sum and difference of ones")),
}


def test_all_examples_are_tested_and_short() -> None:
    found = {path.stem: len(path.read_text().splitlines()) for path in (PROJECT / "examples").glob("*.py")}
    assert set(found) == set(EXAMPLES)
    assert all(lines < 40 for lines in found.values()), found


@pytest.mark.parametrize(
    "name", ["own_environments", "adapters", pytest.param("compare_networks", marks=pytest.mark.slow)]
)
def test_an_example_runs(tmp_path: Path, name: str) -> None:
    budget, said = EXAMPLES[name]
    done = subprocess.run(
        [sys.executable, str(PROJECT / "examples" / f"{name}.py"), budget],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PROJECT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in said:
        assert words in done.stdout
    assert done.stderr == ""
