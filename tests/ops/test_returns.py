from __future__ import annotations

import pytest
import torch
from torch import Tensor

from varshare_rl.ops.rl import gae, td_target


def naive_gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor, g: float, lam: float
) -> Tensor:
    """The sum of the discounted errors up to the end of the episode, slot by slot."""
    advantage = torch.zeros_like(reward)
    tasks, steps, envs = reward.shape
    for t in range(tasks):
        for e in range(envs):
            for start in range(steps):
                weight = 1.0
                for s in range(start, steps):
                    future = 0.0 if terminated[t, s, e] else float(next_value[t, s, e])
                    error = float(reward[t, s, e]) + g * future - float(value[t, s, e])
                    advantage[t, start, e] += weight * error
                    if terminated[t, s, e] or truncated[t, s, e]:
                        break
                    weight *= g * lam
    return advantage


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)


def flags(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool).view(1, -1, 1)


def test_gae_by_hand() -> None:
    # errors: 1 + 0.5 * 3 - 2 = 0.5 and 2 + 0.5 * 4 - 3 = 1; the first adds 0.5 * 0.5 of the second
    got = gae(column(1, 2), column(2, 3), column(3, 4), flags(0, 0), flags(0, 0), 0.5, 0.5)
    assert got.flatten().tolist() == [0.75, 1.0]


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        (0, 0, [1 + 0.5 * 10 - 2 + 0.25 * 6.0, 6.0]),  # the episode goes on: the later error counts
        (0, 1, [1 + 0.5 * 10 - 2, 6.0]),  # a time limit: bootstrapped, and the sum stops
        (1, 0, [1.0 - 2, 6.0]),  # a real end: no future value
    ],
)
def test_gae_tells_a_time_limit_from_an_end(terminated: int, truncated: int, expected: list[float]) -> None:
    done = (flags(terminated, 0), flags(truncated, 0))
    got = gae(column(1, 3), column(2, 2), column(10, 10), *done, 0.5, 0.5)
    assert got.flatten().tolist() == expected


def test_gae_equals_a_naive_sum() -> None:
    shape = (2, 12, 3)
    reward, value, next_value = torch.randn(3, *shape, dtype=torch.float64)
    draw = torch.rand(shape)
    terminated, truncated = draw < 0.15, (draw > 0.15) & (draw < 0.35)
    assert terminated.any()
    assert truncated.any()
    arguments = (reward, value, next_value, terminated, truncated, 0.97, 0.9)
    torch.testing.assert_close(gae(*arguments), naive_gae(*arguments))


def test_gae_with_lambda_one_is_the_return_minus_the_value() -> None:
    reward, value = torch.randn(2, 1, 6, 1, dtype=torch.float64)
    next_value = torch.cat([value[:, 1:], torch.full((1, 1, 1), 5.0).double()], 1)
    none = torch.zeros(1, 6, 1, dtype=torch.bool)
    got = gae(reward, value, next_value, none, none, 0.9, 1.0)
    returns = sum(0.9**k * reward[0, k, 0] for k in range(6)) + 0.9**6 * 5.0
    torch.testing.assert_close(got[0, 0, 0], returns - value[0, 0, 0])


def test_td_target_by_hand() -> None:
    got = td_target(torch.tensor([1.0, 1.0]), torch.tensor([4.0, 4.0]), torch.tensor([0.0, 1.0]), 0.5)
    assert got.tolist() == [3.0, 1.0]
