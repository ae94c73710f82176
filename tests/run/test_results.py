import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import metaworld
import mujoco
import numpy as np
import pytest
import torch

from varshare_rl.files import to_json
from varshare_rl.run import results
from varshare_rl.run.results import provenance, summary

PARAMETERS = {"stored": 100, "active_per_task": 60, "shared": 50, "per_task": 5}


def make_summary(tasks: Mapping[str, Mapping[str, float | None]], **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "tasks": tasks,
        "transitions": 5000,
        "updates": 30,
        "seconds": 4.0,
        "parameters": PARAMETERS,
        "provenance": {"suite": "pointmass", "seed": 3},
    }
    return summary(**(arguments | changes))


def test_summary_has_the_published_form() -> None:
    tasks = {
        "reach": {"return": 10.0, "success": 1.0, "success_final": 0.5, "kl": 100.0, "episode_steps": 40.0},
        "push": {"return": -4.0, "success": 0.5, "success_final": 0.0, "kl": 200.0, "episode_steps": 60.0},
    }
    assert json.loads(to_json(make_summary(tasks))) == {
        "mean_success": 0.75,
        "mean_success_final": 0.25,
        "mean_return": 3.0,
        "mean_episode_steps": 50.0,
        "iqm_success": 0.75,
        "iqm_return": 3.0,
        "worst_success": {"1": 0.5},
        "worst_return": {"1": -4.0},
        "tasks": {
            "reach": {"success": 1.0, "success_final": 0.5, "return": 10.0, "episode_steps": 40.0, "kl": 100.0},
            "push": {"success": 0.5, "success_final": 0.0, "return": -4.0, "episode_steps": 60.0, "kl": 200.0},
        },
        "transitions": 5000,
        "updates": 30,
        "seconds": 4.0,
        "transitions_per_second": 1250.0,
        "parameters": PARAMETERS,
        "conditions": {"suite": "pointmass", "seed": 3},
    }


def test_summary_of_a_suite_without_success() -> None:
    tasks: Mapping[str, Mapping[str, float | None]] = {
        "cartpole": {"return": 500.0, "success": None, "success_final": None, "episode_steps": 9.0, "kl": None}
    }
    result = make_summary(tasks, seconds=0.0)
    assert (result["mean_success"], result["mean_success_final"], result["mean_return"]) == (
        None,
        None,
        500.0,
    )
    assert result["tasks"]["cartpole"]["success"] is None
    assert (result["iqm_success"], result["worst_success"]) == (None, {})
    assert (result["iqm_return"], result["worst_return"]) == (500.0, {"1": 500.0})
    assert result["transitions_per_second"] is None


def test_the_middle_half_and_the_worst_few() -> None:
    """By hand: of eleven successes two are left out at each end, and the three lowest are 0, 0.1 and 0.2."""
    successes = [0.9, 0.0, 0.2, 0.1, 1.0, 0.3, 0.4, 0.5, 0.6, 0.8, 0.7]
    names = dict.fromkeys(("success_final", "return", "episode_steps", "kl"), 0.0)
    result = make_summary({str(task): {"success": value, **names} for task, value in enumerate(successes)})
    assert result["iqm_success"] == pytest.approx((0.2 + 0.3 + 0.4 + 0.5 + 0.6 + 0.7 + 0.8) / 7)
    assert result["worst_success"] == {"1": 0.0, "3": pytest.approx(0.1), "10": pytest.approx(0.45)}


def test_summary_misses_nothing_silently() -> None:
    with pytest.raises(KeyError, match="success_final"):
        make_summary({"reach": {"return": 1.0, "success": 1.0, "kl": 0.0}})
    with pytest.raises(KeyError, match="shared"):
        make_summary({}, parameters={"stored": 1, "active_per_task": 1})


def test_conditions_name_the_versions_that_run() -> None:
    found = provenance({"suite": "mt10", "reward_version": "v2", "horizon": 500}, seed=7)
    expected = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "gymnasium": gymnasium.__version__,
        "mujoco": mujoco.__version__,
        "seed": 7,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "suite": "mt10",
        "reward_version": "v2",
        "horizon": 500,
    }
    assert {name: found[name] for name in expected} == expected
    assert metaworld.__name__ in found
    assert found["device_name"]
    assert json.loads(to_json(found)) == found


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_of_a_clone_and_of_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "PROJECT", tmp_path)
    source = tmp_path / "varshare_rl" / "__init__.py"
    source.parent.mkdir()
    source.touch()

    def commit_and_dirty() -> tuple[str | None, bool | None]:
        found = provenance({}, seed=0)
        return found["git_commit"], found["git_dirty"]

    assert commit_and_dirty() == (None, None)  # no repository
    (tmp_path / "other.txt").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "-q", "-m", "another project's")
    assert commit_and_dirty() == (None, None)  # a repository, but of something else
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "ours")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit_and_dirty() == (head, False)
    (tmp_path / "other.txt").write_text("notes do not change a result")
    assert commit_and_dirty() == (head, False)
    (tmp_path / "varshare_rl" / "new.py").touch()
    assert commit_and_dirty() == (head, True)
