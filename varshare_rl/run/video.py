"""Films of an agent: an episode of every task, and all of them side by side."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from varshare_rl.algorithms.base import Algorithm, EvaluationPolicy
from varshare_rl.envs.suite import Frame, RenderingEngine, Suite
from varshare_rl.errors import UserError, missing_extra, one_line
from varshare_rl.run.evaluation import device_of
from varshare_rl.run.process import one_thread, own_random

FRAMES_PER_SECOND = 25
MOST_FRAMES = 250  # of an episode; longer ones are shown in larger steps
LABEL_HEIGHT, CELL = 36, 256  # pixels; of a label, and of a side of a picture in the grid
GRID = "all_tasks.mp4"


@dataclass
class Film:
    """Episode of one task.

    Attributes:
        task: its name.
        frames: labelled pictures as JPEG, which are small.
        steps, earned, success: of the episode so far; success is None in a suite that has none.
    """

    task: str
    frames: list[bytes] = field(default_factory=list)
    steps: int = 0
    earned: float = 0.0
    success: bool | None = None

    def add(self, frame: Frame) -> None:
        """Add a picture with the numbers of now above it."""
        self.frames.append(_pack(labelled(frame, self)))


def require_encoder() -> Any:
    """Return the module that encodes films. Raises UserError where it is not installed."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise missing_extra("video=true needs an encoder", "video") from error
    return imageio_ffmpeg


@torch.no_grad()
def film(algorithm: Algorithm, suite: Suite, seed: int, deterministic: bool = True) -> list[Film]:
    """Play the first evaluation episode of every task, and look at it.

    Not ``deterministic``: actions are drawn as in training.

    Raises:
        UserError: there are no pictures of the suite, or nothing here draws them.
    """
    with own_random(seed), one_thread():
        engine = suite.make_rendering_engine(seed)
        try:
            return _film(algorithm.evaluation_policy(1, deterministic), device_of(algorithm), suite, engine)
        except UserError:
            raise
        except Exception as error:
            reason = one_line(error, most=None)
            raise UserError(
                f"nothing could be drawn of env={suite.name} ({reason}); without a screen MuJoCo needs "
                "MUJOCO_GL=osmesa (apt-get install libosmesa6) or MUJOCO_GL=egl (libegl1)"
            ) from error
        finally:
            engine.close()


def _film(policy: EvaluationPolicy, device: torch.device, suite: Suite, engine: RenderingEngine) -> list[Film]:
    films = [Film(name, success=False if suite.has_success else None) for name in suite.task_names]
    running, every = np.ones(len(films), dtype=bool), math.ceil(suite.horizon / MOST_FRAMES)
    obs, pictures = engine.reset(), engine.render()
    step_number = 0
    while running.any():
        if step_number % every == 0:
            pictures = engine.render() if step_number else pictures
            for task in np.flatnonzero(running):
                films[task].add(pictures[task])
        step = engine.step(policy.act(torch.from_numpy(obs).to(device)).cpu().numpy())
        ended = step.terminated | step.truncated
        policy.observe(torch.from_numpy(ended))
        obs, step_number = step.obs, step_number + 1
        for task in np.flatnonzero(running):
            one = films[task]
            one.steps, one.earned = step_number, one.earned + float(step.reward[task, 0])
            if one.success is not None:
                one.success |= bool(step.success[task, 0])
            if ended[task, 0]:  # the environment is in its next episode: the last picture with the final numbers
                one.add(pictures[task])
        running &= ~ended[:, 0]
    return films


def write_films(films: Sequence[Film], folder: Path) -> None:
    """Write ``<task>.mp4`` of each, and all side by side, into a folder."""
    encoder = require_encoder()
    for one in films:
        _encode(encoder, folder / f"{re.sub(r'[^a-zA-Z0-9_.-]', '_', one.task)}.mp4", map(_unpack, one.frames))
    _encode(encoder, folder / GRID, grid(films))


def grid(films: Sequence[Film]) -> Iterator[Frame]:
    """Yield pictures of all films side by side; those that have ended stay at their last one."""
    columns = math.ceil(math.sqrt(len(films)))
    rows = math.ceil(len(films) / columns)
    for number in range(max(len(one.frames) for one in films)):
        sheet = Image.new("RGB", (columns * CELL, rows * (CELL + LABEL_HEIGHT)), "white")
        for place, one in enumerate(films):
            picture = Image.fromarray(_unpack(one.frames[min(number, len(one.frames) - 1)]))
            picture.thumbnail((CELL, CELL + LABEL_HEIGHT))
            sheet.paste(picture, (place % columns * CELL, place // columns * (CELL + LABEL_HEIGHT)))
        yield np.asarray(sheet)


def labelled(frame: Frame, one: Film) -> Frame:
    """Put the task, step, return and success of an episode above a picture, at least as wide as in the grid."""
    picture = Image.fromarray(frame)
    if picture.width < CELL:
        picture = picture.resize((CELL, round(picture.height * CELL / picture.width)))
    size = (
        picture.width + picture.width % 2,
        picture.height + LABEL_HEIGHT + picture.height % 2,
    )  # even, for codecs
    sheet = Image.new("RGB", size, "#222222")
    sheet.paste(picture, (0, LABEL_HEIGHT))
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, LABEL_HEIGHT, size[0] - 1, size[1] - 1), outline="#222222")
    pen.text((6, 3), one.task, "white", _font())
    pen.text((6, 18), f"step {one.steps}   return {one.earned:,.1f}", "white", _font())
    if one.success:
        pen.text((picture.width - 6, 18), "success", "#7ad151", _font(), anchor="ra")
    return np.asarray(sheet)


def _encode(encoder: Any, path: Path, frames: Iterable[Frame]) -> None:
    """Write a film; its last picture stays for a second."""
    writer: Any = None
    for frame in frames:
        if writer is None:
            height, width, _ = frame.shape
            writer = encoder.write_frames(
                str(path), (width, height), fps=FRAMES_PER_SECOND, macro_block_size=2, ffmpeg_log_level="error"
            )
            writer.send(None)
        writer.send(np.ascontiguousarray(frame))
    for _ in range(FRAMES_PER_SECOND):
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def _pack(frame: Frame) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _unpack(data: bytes) -> Frame:
    return np.asarray(Image.open(io.BytesIO(data)))


@lru_cache
def _font() -> Any:
    return ImageFont.load_default(12)
