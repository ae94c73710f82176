"""The sequences and methods that can be chosen compose, and their tasks are what they say."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from varshare_rl.cli import compose
from varshare_rl.continual.agent import NetworkProbe
from varshare_rl.continual.config import (
    ContinualConfig,
    one_task,
    with_task_list,
)
from varshare_rl.continual.evaluation import tables
from varshare_rl.continual.tasks import new_tasks
from varshare_rl.nn import VarShareLayer
from varshare_rl.registry import lookup, registered


def composed(*overrides: str) -> ContinualConfig:
    return cast(ContinualConfig, compose("continual", overrides))


@pytest.mark.parametrize("method", registered("method"))
def test_every_method_is_chosen_by_its_name(method: str) -> None:
    assert type(composed(f"method={method}").method) is lookup("method", method)


@pytest.mark.parametrize("method", ["lora", "share", "varshare"])
def test_corrections_learn_at_the_rate_that_was_found_for_the_suite(method: str) -> None:
    assert composed(f"method={method}", "env=metaworld", "env.tasks=[reach-v3]").method.lr_scale == 3
    assert composed(f"method={method}", "env=light8").method.lr_scale == 1
    given = composed(f"method={method}", "env=metaworld", "env.tasks=[reach-v3]", "method.lr_scale=2")
    assert given.method.lr_scale == 2


@pytest.mark.parametrize(("env", "count", "per_task"), [("cw10", 10, 1_000_000), ("cw20", 20, 1_000_000)])
def test_continual_world(env: str, count: int, per_task: int) -> None:
    config = composed(f"env={env}", "algorithm=sac")
    tasks = new_tasks(config)
    assert len(tasks) == len({task.name for task in tasks}) == count
    assert config.total_transitions // count == per_task
    assert config.network.hidden == [256] * 4
    assert {task.suite.horizon for task in tasks} == {200}
    assert [len(table) for table in tables(tasks)] == [10] * (count // 10)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_the_layers_of_a_method_draw_at_the_temperature(temperature: float) -> None:
    x, passes = torch.randn(1, 5, 3), []
    for degrees in (0.0, 1.0, temperature):
        networks = NetworkProbe(composed("network.hidden=[]", f"elbo.temperature={degrees}"))
        networks.network("actor", 3, 2)
        stack = networks.asked["actor"][0][2]
        torch.manual_seed(0)
        passes.append(stack(lambda *sizes: VarShareLayer(*sizes, 1, 0.1))(x, torch.tensor([0])))
    mean, full, tempered = passes
    assert (full - mean).abs().max() > 0
    torch.testing.assert_close(tempered - mean, temperature * (full - mean))


def test_a_benchmark_becomes_its_list_of_tasks() -> None:
    config = composed("env=mt10")
    tasks = new_tasks(config)
    assert tasks[0].env.benchmark is None
    assert [task.env.tasks for task in tasks[:2]] == [["reach-v3"], ["push-v3"]]
    assert tasks[0].suite is tasks[9].suite
    assert with_task_list(tasks[0].env, tasks[0].suite) is tasks[0].env


def test_one_task_keeps_its_own_reward_scale() -> None:
    config = composed("env.tasks=[normal_left,normal_right]", "env.reward_scales=[1,100]")
    tasks = new_tasks(config)
    assert [task.env.reward_scales for task in tasks] == [[1.0], [100.0]]
    assert one_task(config.env, tasks[0].suite, 1) == tasks[1].env
