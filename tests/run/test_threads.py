"""Threads that training computes with: one where products are small, whatever else runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM, last_of_each

from varshare_rl.algorithms.ppo import PPO
from varshare_rl.algorithms.sac import SAC
from varshare_rl.assemble import build_algorithm, build_suite
from varshare_rl.cli import compose
from varshare_rl.reading import read_object
from varshare_rl.run.process import threads_for


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_only_large_products_are_divided(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads_for(8 * 128 * 64 * 64) == 1
    assert threads_for(10 * 128 * 400 * 400) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads_for(1) == 2


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (("algorithm=ppo", "algorithm.rollout_transitions_per_task=40", "algorithm.minibatches=2"), 20),
        (("algorithm=sac", "algorithm.batch_per_task=16"), 16),
        (("algorithm=sac", "algorithm.batch_per_task=16", "algorithm.tasks_per_update=4"), 8),
    ],
)
def test_the_largest_product_is_that_of_rows_and_the_largest_weight(words: tuple[str, ...], rows: int) -> None:
    config = compose(
        "train", ["env=pointmass", "network=varshare_lora", "env.envs_per_task=4", "network.hidden=[32,24]", *words]
    )
    suite = build_suite(config)
    algorithm = build_algorithm(config, suite, torch.device("cpu"))
    assert algorithm.largest_product() == 8 * rows * 32 * 24


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_a_run_computes_with_them_and_says_so(
    command: Command, folder: Path, name: str, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, found = {"ppo": PPO, "sac": SAC}[name], set()
    plain = kind.update

    def watched(self: PPO | SAC) -> object:
        found.add(torch.get_num_threads())
        return plain(self)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "update", watched)
    words = last_of_each([*TINY, *TINY_ALGORITHM[name], "total_transitions=640", "run_dir=run"])
    assert command("train", *words).code == 0
    assert found == {1}
    assert torch.get_num_threads() == 2
    assert read_object(folder / "run/summary.json")["conditions"]["threads"] == 1


def test_threads_that_wait_do_not_keep_a_core() -> None:
    """The environment of a command is set before torch is imported, unless the user has set it."""
    code = "import varshare_rl, os, sys; assert 'torch' not in sys.modules; print(os.environ['GOMP_SPINCOUNT'])"
    free = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for given, expected in ((free, "1000"), (free | {"GOMP_SPINCOUNT": "7"}, "7")):
        out = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == expected
