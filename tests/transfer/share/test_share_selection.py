"""Finding out which task it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from share_reference import adapters, dense

from varshare_rl.adapters import LowRank
from varshare_rl.transfer.share import (
    BasisMethod,
    LearnConfig,
    ReturnBandit,
    ShareConfig,
    SizeConfig,
    attach,
    average,
    consolidate,
    for_all_tasks,
    task_by_td_error,
)


def test_the_bandit_finds_the_task_with_the_best_return() -> None:
    generator = np.random.default_rng(0)
    means = np.array([-120.0, -40.0, -100.0, -60.0, -90.0])  # returns of any scale
    found, waste = 0, 0
    for _ in range(40):
        bandit = ReturnBandit(5)
        for _ in range(60):
            task = bandit.choose()
            bandit.update(task, float(generator.normal(means[task], 15.0)))
        found += bandit.best == 1
        waste += 60 - bandit.episodes[1]
    assert found >= 38
    assert waste / 40 < 35  # choosing in turn would spend 48 of 60 episodes elsewhere


def test_the_bandit_by_hand() -> None:
    bandit = ReturnBandit(2, exploration=0.5)
    assert bandit.choose() == 0
    bandit.update(0, 10.0)
    assert bandit.choose() == 1
    bandit.update(1, 20.0)
    bandit.update(1, 16.0)
    # scaled means 0 and 0.8; widths 0.5 sqrt(2 log 3 / n): 0.741 and 0.524
    assert bandit.choose() == 1
    for _ in range(20):
        bandit.update(1, 11.0)
    # now the second task's mean is (36 + 220) / 22 = 11.6, scaled 0.164, width 0.267; the first one's width 1.26
    assert bandit.choose() == 0
    assert bandit.best == 1
    assert bandit.episodes == [1, 22]


def test_equal_returns_divide_by_nothing() -> None:
    bandit = ReturnBandit(3)
    for _ in range(9):
        bandit.update(bandit.choose(), 5.0)
    assert bandit.episodes == [3, 3, 3]


def test_the_bandit_refuses_nonsense() -> None:
    bandit = ReturnBandit(2)
    with pytest.raises(ValueError, match="no episode yet"):
        _ = bandit.best
    with pytest.raises(IndexError, match="unknown task id 2"):
        bandit.update(2, 1.0)
    with pytest.raises(ValueError, match="finite"):
        bandit.update(0, math.nan)
    with pytest.raises(ValueError, match="num_tasks is 0"):
        ReturnBandit(0)


def test_td_error_by_hand() -> None:
    reward, terminated = torch.tensor([1.0, 2.0]), torch.tensor([False, True])
    values = torch.tensor([[1.5, 2.0], [0.0, 1.0]])
    next_values = torch.tensor([[1.0, 99.0], [2.0, 99.0]])
    task, errors = task_by_td_error(reward, terminated, values, next_values, discount=0.5)
    # task 0: 1 + 0.5 - 1.5 = 0 and 2 - 2 = 0; task 1: 1 + 1 - 0 = 2 and 2 - 1 = 1
    assert task == 0
    torch.testing.assert_close(errors, torch.tensor([0.0, 2.5]))
    with pytest.raises(ValueError, match="no transitions"):
        task_by_td_error(reward[:0], terminated[:0], values[:, :0], next_values[:, :0], 0.5)


def test_td_error_finds_the_task_of_a_critic_in_a_basis() -> None:
    """Linear critics per task in one basis; transitions of task 2 follow its own value function."""
    given = adapters(4, 1, out=1, into=6)
    share = consolidate(given, ShareConfig(k=SizeConfig(fixed=4)))
    model = torch.nn.ModuleDict({"layer0": torch.nn.Linear(6, 1)})
    layer = attach(model, share, LearnConfig(), tasks=share.tasks)["layer0"].eval()
    states, successors = torch.randn(50, 6), torch.randn(50, 6)
    with torch.no_grad():
        values, next_values = (for_all_tasks(layer, x, 4)[..., 0] for x in (states, successors))
        reward = values[2] - 0.9 * next_values[2]
    assert values.shape == (4, 50)
    torch.testing.assert_close(values[3], layer(states, 3)[:, 0].detach())
    task, errors = task_by_td_error(reward, torch.zeros(50, dtype=torch.bool), values, next_values, 0.9)
    assert task == 2
    assert float(errors[2]) < 1e-9 < float(errors[[0, 1, 3]].min())


@pytest.mark.parametrize("method", list(BasisMethod))
def test_the_average_is_that_of_the_corrections_in_any_gauge(method: BasisMethod) -> None:
    given = adapters(4, 3)
    flipped = {
        task: {"layer0": LowRank(-adapter["layer0"].a, -adapter["layer0"].b, adapter["layer0"].scale)}
        if index % 2
        else adapter
        for index, (task, adapter) in enumerate(given.items())
    }
    expected = sum(dense(adapter["layer0"]) for adapter in given.values()) / 4
    for made in (given, flipped):
        share = consolidate(made, ShareConfig(method, SizeConfig(fixed=1000)))
        rebuilt = sum(dense(share.rebuild(task)["layer0"]) for task in share.tasks) / 4
        np.testing.assert_allclose(dense(average(share)["layer0"]), rebuilt, atol=1e-5)
        if method is not BasisMethod.paper:
            np.testing.assert_allclose(dense(average(share)["layer0"]), expected, atol=1e-4)
