"""Agents that really learn, on the suites that take seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

#: Two goals and two dynamics: a policy blind to its task succeeds in half of them at most.
FOUR = "env.tasks=[normal_left,normal_right,flipped_down,flipped_up]"
QUICK = {
    "ppo": ("algorithm=ppo", "total_transitions=120000"),
    "sac": ("algorithm=sac", "total_transitions=16000"),
}


def train(command: Command, *overrides: str) -> dict[str, Any]:
    outcome = command("train", *overrides, "evaluate.every=0", "log.quiet=true", "device=cpu", "run_dir=run")
    assert outcome.code == 0, outcome.err
    summary: dict[str, Any] = json.loads(Path("run/summary.json").read_text())
    return summary


@pytest.mark.parametrize("algorithm", QUICK)
def test_point_masses_that_conflict(command: Command, algorithm: str) -> None:
    summary = train(command, "env=pointmass", FOUR, *QUICK[algorithm])
    print(summary["seconds"], summary["mean_success"], {k: v["success"] for k, v in summary["tasks"].items()})
    assert summary["mean_success"] >= 0.9
