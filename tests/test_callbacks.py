"""Functions of the user that are called while a run trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, TINY_ALGORITHM

import varshare_rl as vs
from varshare_rl.run.evaluation import Evaluation

PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"
SETTINGS = (*(item for item in TINY if not item.startswith(("evaluate.every", "env="))), *TINY_ALGORITHM["ppo"])


def test_callbacks_see_what_is_logged_evaluated_and_saved(folder: Path) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    evaluated: list[tuple[int, Evaluation]] = []
    saved: list[tuple[int, str]] = []
    vs.train(
        "pointmass", *SETTINGS, "evaluate.every=320", "run_dir=run", total_transitions=640,
        on_log=lambda transitions, metrics: logged.append((transitions, metrics)),
        on_evaluate=lambda transitions, evaluation: evaluated.append((transitions, evaluation)),
        on_checkpoint=lambda transitions, folder: saved.append((transitions, folder.name)),
    )  # fmt: skip
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [count for count, _ in logged] == [160, 320, 480, 640]
    assert [count for count, _ in evaluated] == [0, 320, 640]
    written = [line for line in lines if "time/updates" in line]
    for (_, metrics), line in zip(logged, written, strict=True):
        assert metrics.items() <= line.items()
    summary = json.loads(Path("run/summary.json").read_text())
    assert evaluated[-1][1].mean("return") == pytest.approx(summary["mean_return"])
    assert {count for count, name in saved if name.startswith("last")} == {0, 640}
    assert (0, "best-000000000000") in saved
    assert saved[-1] == (640, "last-000000000640")


@pytest.mark.parametrize("moment", ["on_log", "on_evaluate"])
def test_false_ends_the_training_with_all_results(folder: Path, moment: str) -> None:
    agent = vs.train(
        "pointmass", *SETTINGS, "evaluate.every=320", "run_dir=run", total_transitions=6400,
        **{moment: lambda transitions, found: np.bool_(transitions < 320)},
    )  # fmt: skip
    assert agent.results["transitions"] == 320
    again = vs.train(resume="run", total_transitions=480)
    assert again.results["transitions"] == 480


def test_the_example_of_the_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    short = ", ".join(repr(item) for item in (*SETTINGS, "total_transitions=320", "evaluate.every=160"))
    space: dict[str, Any] = {}
    exec(code.replace('"pointmass",', f'"pointmass", {short},'), space)
    out = capsys.readouterr().out
    assert re.search(r"^0 \S+ -\d", out, re.MULTILINE)
    assert "saved runs/pointmass" in out
    assert space["agent"].results["transitions"] == 320
