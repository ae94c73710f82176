"""The sequences and methods that can be chosen compose, and their tasks are what they say."""

from __future__ import annotations

from typing import cast

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from varshare_rl.cli import config_folder
from varshare_rl.continual.config import (
    METHODS,
    ContinualConfig,
    check_continual_config,
    one_task,
    register_continual_schemas,
    with_task_list,
)
from varshare_rl.continual.evaluation import tables
from varshare_rl.continual.tasks import new_tasks


def composed(*overrides: str) -> ContinualConfig:
    register_continual_schemas()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = cast(ContinualConfig, OmegaConf.to_object(compose("continual", overrides=list(overrides))))
    check_continual_config(config)
    return config


def test_every_method_has_a_file_and_is_made_from_it() -> None:
    files = {path.stem for path in (config_folder() / "method").glob("*.yaml")}
    assert files == set(METHODS)
    for name, (options, _) in METHODS.items():
        assert type(composed(f"method={name}").method) is options


@pytest.mark.parametrize(("env", "count", "per_task"), [("cw10", 10, 1_000_000), ("cw20", 20, 1_000_000)])
def test_continual_world(env: str, count: int, per_task: int) -> None:
    config = composed(f"env={env}", "algorithm=sac")
    tasks = new_tasks(config)
    assert len(tasks) == len({task.name for task in tasks}) == count
    assert config.total_transitions // count == per_task
    assert config.network.hidden == [256] * 4
    assert {task.suite.horizon for task in tasks} == {200}
    assert [len(table) for table in tables(tasks)] == [10] * (count // 10)


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
