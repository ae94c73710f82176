"""``evaluate video=true``: films of what was played, with its numbers, and what refuses to be drawn."""

from __future__ import annotations

import gc
import sys
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import Command
from gymnasium.spaces import Box
from helpers import TINY, TINY_ALGORITHM, build
from test_errors import assert_one_line

from varshare_rl.algorithms.ppo import PPOConfig
from varshare_rl.envs import pictures
from varshare_rl.envs.cartpole import CartPoleConfig
from varshare_rl.envs.gymnasium_suite import GymnasiumConfig
from varshare_rl.envs.metaworld import MetaWorldConfig
from varshare_rl.envs.objects import ObjectsConfig
from varshare_rl.envs.pictures import choose_gl
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.errors import UserError
from varshare_rl.run.evaluation import evaluate
from varshare_rl.run.video import CELL, FRAMES_PER_SECOND, LABEL_HEIGHT, _unpack, film, grid

TWO = ("env.tasks=[normal_left,flipped_up]", "env.horizon=10", "total_transitions=160", "run_dir=run")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_films_of_every_task_and_of_all(command: Command) -> None:
    encoder = pytest.importorskip("imageio_ffmpeg")
    assert command("train", *TINY, *TINY_ALGORITHM["ppo"], *TWO).code == 0
    outcome = command("evaluate", "run=run", "episodes=1", "video=true")
    assert outcome.code == 0, outcome.err
    assert "written: run/video/all_tasks.mp4" in outcome.out
    names = {"normal_left": (CELL, CELL), "flipped_up": (CELL, CELL), "all_tasks": (2 * CELL, CELL)}
    assert {path.name for path in Path("run/video").iterdir()} == {f"{name}.mp4" for name in names}
    for name, (width, height) in names.items():
        reader = encoder.read_frames(f"run/video/{name}.mp4")
        assert next(reader)["size"] == (width, height + LABEL_HEIGHT)
        assert len(list(reader)) == 11 + FRAMES_PER_SECOND  # ten steps, the end, and a second of it
    gc.collect()  # imageio-ffmpeg leaves its pipes to the collector, which is not to come in another test


def test_a_film_is_of_the_first_evaluation_episode() -> None:
    suite, engine, learner = build(PointMassConfig(tasks=["normal_left", "heavy_up_right"]), PPOConfig())
    engine.close()
    with torch.no_grad():
        films = film(learner, suite, seed=5)
        evaluation = evaluate(learner, suite, suite.make_engine(1, 5, evaluation=True), 1)
    for one, (task, row) in zip(films, evaluation.tasks.items(), strict=True):
        assert (one.task, one.steps, one.success) == (task, 40, bool(row["success"]))
        assert one.earned == pytest.approx(row["return"], rel=1e-6)
        assert len(one.frames) == 41
    assert not np.array_equal(_unpack(films[0].frames[0]), _unpack(films[0].frames[-1]))
    (first, *_) = grid(films)
    assert first.shape == (CELL + LABEL_HEIGHT, 2 * CELL, 3)


def test_the_goal_is_where_it_is_and_the_mass_too() -> None:
    """By hand: the goal of normal_left is at (-1, 0), and 256 pixels are three metres."""
    engine = PointMassConfig(tasks=["normal_left"]).build().make_rendering_engine(0)
    (frame,) = engine.render()
    assert tuple(frame[128, 43]) == (0xA9, 0xDF, 0xBF)
    x, y = engine.reset()[0, 0, :2]
    assert tuple(frame[round(128 * (1 - y / 1.5)), round(128 * (1 + x / 1.5))]) == (0x00, 0x72, 0xB2)


def test_poles_and_gymnasium_environments_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    upright = CartPoleConfig(tasks=["standard", "long"]).build().make_rendering_engine(0).render()
    assert [frame.shape for frame in upright] == [(256, 256, 3)] * 2
    poles = [(frame == (0xD5, 0x5E, 0x00)).all(-1).any(1).sum() for frame in upright]
    assert poles[1] == pytest.approx(2 * poles[0], rel=0.05)
    engine = GymnasiumConfig(ids=["CartPole-v1"]).build().make_rendering_engine(0)
    engine.reset()
    (frame,) = engine.render()
    engine.close()
    assert frame.shape == (400, 600, 3)
    assert frame.std() > 5


class Blind(gymnasium.Env[Any, Any]):
    observation_space, action_space = Box(-1.0, 1.0, (1,)), Box(-1.0, 1.0, (1,))

    def reset(self, **kwargs: Any) -> Any:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def render(self) -> Any:
        return None


def test_what_cannot_be_drawn_is_said_in_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = ObjectsConfig(horizon=5).build({"blind": Blind})
    engine = suite.make_rendering_engine(0)
    engine.reset()
    with pytest.raises(UserError, match=r"task blind gives no pictures, its render_mode is None; make it with"):
        engine.render()
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    outcome = command("evaluate", "run=run", "video=true")
    assert outcome.code == 2
    assert command("train", *TINY, *TINY_ALGORITHM["ppo"], *TWO).code == 0
    outcome = command("evaluate", "run=run", "video=true")
    assert_one_line(outcome.code, outcome.err, "video=true needs an encoder, of the extra video")
    assert not Path("run/video").exists()


def test_the_package_of_the_system_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MUJOCO_GL", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pictures, "find_library", lambda name: None)
    with pytest.raises(UserError, match="apt-get install libosmesa6 or libegl1"):
        choose_gl()
    choose_gl(needed=False)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(UserError, match=r"MUJOCO_GL=egl needs a library .*: apt-get install libegl1"):
        choose_gl()


@pytest.mark.slow
@pytest.mark.skipif(find_library("OSMesa") is None, reason="this system has no OSMesa")
def test_meta_world_is_drawn_and_played_as_in_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    suite, engine, learner = build(MetaWorldConfig(tasks=["reach-v3"], horizon=12, workers=1), PPOConfig())
    engine.close()
    (one,) = film(learner, suite, seed=0)
    two = MetaWorldConfig(tasks=["reach-v3", "drawer-close-v3"], workers=1).build().make_rendering_engine(0)
    two.reset()
    for _ in range(2):  # each in its own context, also once the other has one
        (alone, _) = two.render()
    two.close()
    assert np.abs(alone.astype(int) - _unpack(one.frames[0])[LABEL_HEIGHT:]).mean() < 8  # of 255, JPEG and border
    evaluation = evaluate(learner, suite, suite.make_engine(1, 0, evaluation=True), 1)
    assert one.earned == pytest.approx(evaluation.tasks["reach-v3"]["return"], rel=1e-5)
    frames = [_unpack(frame) for frame in one.frames]
    assert frames[0].shape == (CELL + LABEL_HEIGHT, CELL, 3)
    assert frames[0][LABEL_HEIGHT:].std() > 10
