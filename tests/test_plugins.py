"""A package of the user's own, outside the repository: its suite, network, KL schedule and gradient aggregator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PLUGIN = '''
"""Components of somebody else's."""

from dataclasses import dataclass, replace

import gymnasium
import numpy as np
from torch import Tensor, nn

from varshare_rl.envs.objects import ObjectsConfig, ObjectSuite
from varshare_rl.fields import bounded
from varshare_rl.nn import NetworkConfig, Posterior, SharedLayer
from varshare_rl.optim.aggregators import GradientAggregator
from varshare_rl.optim.kl_schedules import KLSchedule
from varshare_rl.registry import register


class Still(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), -float(action[0] ** 2), False, False, {}


@register("env", "still")
@dataclass
class StillConfig(ObjectsConfig):
    name: str = "still"

    def build(self) -> ObjectSuite:
        self.horizon = self.horizon or 5
        return ObjectSuite(self, {"one": Still, "two": Still})


@register("network", "halved")
@dataclass
class HalvedConfig(NetworkConfig):
    name: str = "halved"
    divisor: int = bounded(2, least=1)
    "Factor by which hidden layers are narrower."

    def build(self, in_features: int, out_features: int, num_tasks: int, posterior: Posterior) -> nn.Module:
        narrow = replace(self, hidden=[max(size // self.divisor, 1) for size in self.hidden])
        return narrow.stack(in_features, out_features, SharedLayer)


@register("elbo/schedule", "doubled")
@dataclass
class DoubledConfig:
    name: str = "doubled"

    def build(self, kl_weight: float, num_tasks: int) -> KLSchedule:
        return KLSchedule(2.0 * kl_weight)


class First(GradientAggregator):
    def __call__(self, rows: Tensor, losses: Tensor, kept: Tensor | None) -> Tensor:
        return rows[0] * len(rows)


@register("gradient", "first")
@dataclass
class FirstConfig:
    def build(self, num_tasks: int) -> GradientAggregator:
        return First()
'''
CHOSEN = ("env=still", "network=halved", "elbo/schedule=doubled", "gradient=first")
TINY = (
    "total_transitions=80", "env.envs_per_task=2", "network.hidden=[8]", "algorithm.minibatches=1",
    "algorithm.rollout_transitions_per_task=20", "algorithm.epochs=1", "log.every=40", "evaluate.episodes=1",
    "device=cpu",
)  # fmt: skip


def run(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"varshare_rl.{module}", *arguments], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "their_package.py").write_text(PLUGIN)
    return tmp_path


def test_components_of_a_package_outside_work_in_every_command(folder: Path) -> None:
    plugins = "plugins=[their_package]"
    done = run(folder, "train", plugins, *CHOSEN, *TINY, "run_dir=one")
    assert done.returncode == 0, done.stderr
    stored = yaml.safe_load((folder / "one/config.yaml").read_text())
    assert stored["plugins"] == ["their_package"]
    assert stored["network"]["divisor"] == 2
    assert stored["gradient"]["actor"] == "first"
    for module, arguments in {
        "evaluate": ("run=one", "episodes=1", plugins),
        "train": ("resume=one", "total_transitions=160", plugins),
        "export": ("run=one", "task=two", "format=torch", plugins),
    }.items():
        done = run(folder, module, *arguments)
        assert done.returncode == 0, (module, done.stderr)


def test_a_folder_alone_does_not_run_code_of_its_plugins(folder: Path) -> None:
    assert run(folder, "train", "plugins=[their_package]", *CHOSEN, *TINY, "run_dir=one").returncode == 0
    done = run(folder, "evaluate", "run=one")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "give plugins=[their_package] to load them" in done.stderr


@pytest.mark.parametrize(
    ("source", "arguments", "named"),
    [
        ("", ("plugins=[no_such_package]",), "no_such_package"),
        ("raise RuntimeError('broken inside')", ("plugins=[their_package]",), "broken inside"),
        (
            PLUGIN,
            ("plugins=[their_package]", "network=halved", "network.divisor=0", "env=pointmass"),
            "divisor is 0",
        ),
        (PLUGIN, ("network=halved", "env=pointmass"), "halved"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_one_line(
    tmp_path: Path, source: str, arguments: tuple[str, ...], named: str
) -> None:
    (tmp_path / "their_package.py").write_text(source)
    done = run(tmp_path, "train", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
    assert not (tmp_path / "runs").exists()


def test_yaml_of_ones_own_extends_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine/env").mkdir(parents=True)
    (tmp_path / "mine/env/short.yaml").write_text(
        "# @package _global_\ndefaults:\n  - pointmass_schema\n\ntotal_transitions: 64\nenv:\n  horizon: 4\n"
    )
    done = run(
        tmp_path, "train", "--config-dir", "mine", "env=short", "env.tasks=[normal_left]", "env.envs_per_task=2",
        "network.hidden=[8]", "evaluate.episodes=1", "device=cpu", "run_dir=one",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "one/config.yaml").read_text())["env"]["horizon"] == 4
