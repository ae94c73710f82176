import random
from pathlib import Path

import numpy as np
import pytest
import torch

from varshare_rl.errors import UserError
from varshare_rl.run.checkpoint import load_checkpoint, save_checkpoint
from varshare_rl.run.process import load_rng_state, rng_state, seed_everything


def draw() -> list[float]:
    # an odd number of normal draws leaves a cached second one behind in Python's and numpy's generators
    numpy_draws = np.random.normal(size=3)  # noqa: NPY002
    return [random.gauss(0, 1), random.random(), *numpy_draws, *torch.randn(3).tolist()]


def test_same_seed_same_draws() -> None:
    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_state_survives_a_checkpoint(tmp_path: Path) -> None:
    seed_everything(0)
    draw()
    path = save_checkpoint(tmp_path, "last", 0, rng_state())
    expected = draw() + draw()
    seed_everything(99)
    load_rng_state(load_checkpoint(path))
    assert draw() + draw() == expected


def test_the_state_of_the_device_in_use_is_put_back_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    put_back: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: put_back.append(int(state[0])))
    state = rng_state() | {"cuda": [torch.tensor([7]), torch.tensor([8])]}  # of two devices, as formerly
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load_rng_state(state)
    assert put_back == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    load_rng_state(state)
    assert put_back == [7]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_impossible_seed_is_a_user_error(seed: int) -> None:
    with pytest.raises(UserError, match=rf"seed={seed}: .* from 0 to 4294967295"):
        seed_everything(seed)
