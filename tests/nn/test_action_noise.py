from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from varshare_rl.nn.action_noise import ActionNoise

T, E, A = 2, 4000, 3


def steps(noise: ActionNoise, count: int) -> Tensor:
    """Noise of so many vector steps without an end of an episode, ``[count, T, E, A]``."""
    drawn = []
    for _ in range(count):
        drawn.append(noise.draw(E))
        noise.record(torch.zeros(T, E, dtype=torch.bool))
    return torch.stack(drawn)  # type: ignore[arg-type]


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


@pytest.mark.parametrize("c", [0.3, 0.8])
def test_it_is_standard_normal_and_forgets_by_powers_of_the_correlation(c: float) -> None:
    torch.manual_seed(0)
    drawn = steps(ActionNoise(c, (T, E, A)), 12)
    for moment in drawn:
        assert float(moment.mean()) == pytest.approx(0.0, abs=0.03)
        assert float(moment.var()) == pytest.approx(1.0, abs=0.04)
    for lag in (1, 2, 4):
        assert correlation(drawn[0], drawn[lag]) == pytest.approx(c**lag, abs=0.03)
        assert correlation(drawn[7], drawn[7 + lag]) == pytest.approx(c**lag, abs=0.03)
    assert correlation(drawn[3, 0], drawn[3, 1]) == pytest.approx(0.0, abs=0.03)  # tasks have their own
    assert correlation(drawn[3, ..., 0], drawn[3, ..., 1]) == pytest.approx(0.0, abs=0.03)  # so have dimensions


@pytest.mark.parametrize("told", ["record", "end"])
def test_an_episode_begins_anew(told: str) -> None:
    torch.manual_seed(0)
    noise = ActionNoise(0.9, (T, E, A))
    before = noise.draw(E)
    done = torch.zeros(T, E, dtype=torch.bool)
    done[0] = True
    if told == "record":
        noise.record(done)
    else:
        noise.record(torch.zeros_like(done))
        noise.end(done)
    after = noise.draw(E)
    assert before is not None
    assert after is not None
    assert correlation(before[0], after[0]) == pytest.approx(0.0, abs=0.03)
    assert correlation(before[1], after[1]) == pytest.approx(0.9, abs=0.03)


def test_environments_that_act_in_turns_each_go_on_with_their_own() -> None:
    torch.manual_seed(0)
    noise, none = ActionNoise(0.99, (T, E, A)), torch.zeros(T, E, dtype=torch.bool)
    before = noise.draw(E)
    noise.record(none)
    parts = [noise.draw(1000), noise.draw(E - 1000)]
    noise.record(none)
    assert before is not None
    assert correlation(before, torch.cat(parts, dim=1)) == pytest.approx(0.99, abs=0.01)  # type: ignore[arg-type]


def test_what_goes_on_from_a_state_is_the_same() -> None:
    one, other = ActionNoise(0.5, (T, E, A)), ActionNoise(0.5, (T, E, A))
    steps(one, 2)
    other.load_state(deepcopy(one.state()))
    torch.manual_seed(1)
    expected = one.draw(E)
    torch.manual_seed(1)
    torch.testing.assert_close(other.draw(E), expected, rtol=0, atol=0)


def test_it_begins_with_the_first_draw() -> None:
    """SAC's first actions are uniform, and nothing is drawn for them."""
    torch.manual_seed(0)
    noise = ActionNoise(0.9, (T, E, A))
    noise.record(torch.zeros(T, E, dtype=torch.bool))
    first = noise.draw(E)
    assert first is not None
    assert float(first.var()) == pytest.approx(1.0, abs=0.04)


def test_white_noise_is_left_to_the_policy() -> None:
    noise = ActionNoise(0.0, (T, E, A))
    assert noise.draw(E) is None
    noise.record(torch.zeros(T, E, dtype=torch.bool))
    assert noise.value.numel() == 0
