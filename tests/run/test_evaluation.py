"""Episodes that go on from one evaluation to the next."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, TINY_ALGORITHM, last_of_each
from torch import Tensor

from varshare_rl.assemble import build_run
from varshare_rl.cli import compose
from varshare_rl.envs.cartpole import CartPoleConfig, CartPoleSuite
from varshare_rl.envs.pointmass import PointMassConfig, PointMassSuite
from varshare_rl.envs.suite import Suite
from varshare_rl.run.evaluation import EpisodeCursor, play
from varshare_rl.run.process import own_random, seed_everything
from varshare_rl.run_files import METRICS_FILE


class Simple:
    """Pushes a pole where it leans to, and a point nowhere."""

    def __init__(self, suite: Suite) -> None:
        self.discrete, self.size = not suite.action_space.shape, sum(suite.action_space.shape or ())

    def act(self, obs: Tensor) -> Tensor:
        shape = obs.shape[:2]
        return (obs[..., 2] > 0).long() if self.discrete else torch.zeros(*shape, self.size)

    def observe(self, done: Tensor) -> None:
        pass


def played(suite: Suite, episodes: int, rounds: int, names: tuple[str, ...], going_on: bool) -> np.ndarray:
    engine = suite.make_engine(2, 0, evaluation=True)
    stage = EpisodeCursor() if going_on else None
    found = []
    for _ in range(rounds):
        means = play(lambda envs: Simple(suite), suite, engine, episodes, torch.device("cpu"), stage)
        found.append([[row[name] for name in names] for row in means.values()])
    return np.array(found, dtype=np.float64)


class GlobalDraws(PointMassSuite):
    """Draws from all global generators when an engine is made, reset and stepped."""

    def make_engine(self, *arguments: Any, **options: Any) -> Any:
        engine: Any = super().make_engine(*arguments, **options)
        draw()
        for name in ("reset", "step"):
            method = getattr(engine, name)
            setattr(engine, name, lambda *actions, method=method: (draw(), method(*actions))[1])
        return engine


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002


def test_what_environments_draw_in_an_evaluation_is_not_missed_by_training() -> None:
    suite = GlobalDraws(PointMassConfig())
    engine = suite.make_engine(2, 0, evaluation=True)
    seed_everything(3)
    expected = [draw() for _ in range(3)]
    seed_everything(3)
    found = [draw()]
    play(lambda envs: Simple(suite), suite, engine, 2, torch.device("cpu"))
    found.append(draw())
    with own_random(7):
        own = draw()
    found.append(draw())
    assert found == expected
    seed_everything(7)
    assert own == draw()


def test_training_is_the_same_with_and_without_evaluations(tmp_path: Path) -> None:
    """Suites that draw from numpy's and Python's generators, also while an evaluation makes its engine."""
    after = []
    for every in (0, 160):
        overrides = [*TINY, *TINY_ALGORITHM["ppo"], f"evaluate.every={every}", "total_transitions=480"]
        config = compose("train", last_of_each(overrides))
        run = build_run(config, GlobalDraws(config.env), tmp_path / str(every))
        run.start()
        run.train()
        run.close()
        state = run.algorithm.state()
        after.append([draw(), *(value.tolist() for value in state["actor"].values())])
        lines = map(json.loads, (tmp_path / str(every) / METRICS_FILE).read_text().splitlines())
        at = [line["transitions"] for line in lines if "eval/mean_return" in line]
        assert at == ([0, 160, 320, 480] if every else [480])
    assert after[0] == after[1]


def test_episodes_go_on() -> None:
    """Three rounds of two episodes are six episodes, when all take as long."""
    suite = PointMassSuite(PointMassConfig())
    names = ("return", "episode_steps", "success")
    rounds = played(suite, 2, 3, names, going_on=True)
    assert rounds.mean(0) == pytest.approx(played(suite, 6, 1, names, going_on=False)[0])
    assert (rounds[0] == played(suite, 2, 1, names, going_on=False)[0]).all()
    assert (rounds[0, :, 0] != rounds[1, :, 0]).all()


def test_what_is_left_of_an_episode_does_not_count() -> None:
    """Poles do not fall together, so a round ends in the middle of an episode: by hand from one long recording."""
    suite = CartPoleSuite(CartPoleConfig(tasks=["standard"]))
    engine, policy = suite.make_engine(2, 0, evaluation=True), Simple(suite)
    whole: list[list[tuple[int, int]]] = [[], []]  # first step and the step after the last of every slot's episodes
    obs, since = engine.reset(), [0, 0]
    for step in range(1, 600):
        done = engine.step(policy.act(torch.from_numpy(obs)).numpy())
        obs = done.obs
        for slot in np.flatnonzero((done.terminated | done.truncated)[0]):
            whole[slot].append((since[slot], step))
            since[slot] = step
    expected, now = [], 0
    for _ in range(6):
        counted = [next(episode for episode in of_slot if episode[0] >= now) for of_slot in whole]
        expected.append(np.mean([end - first for first, end in counted]))
        now = max(end for _, end in counted)
    steps = played(suite, 2, 6, ("episode_steps",), going_on=True)
    assert steps[:, 0, 0].tolist() == expected
