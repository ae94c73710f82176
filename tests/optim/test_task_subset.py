from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM, build, collect
from torch import Tensor, nn

from varshare_rl.algorithms import sac
from varshare_rl.algorithms.sac import SAC, SACConfig
from varshare_rl.data.normalizers import RewardScale
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.nn import VarShareLoRAConfig
from varshare_rl.nn.critic import CriticConfig
from varshare_rl.nn.task_rows import active_tasks
from varshare_rl.optim.task_subset import TaskSubset
from varshare_rl.run.checkpoint import newest_checkpoint

TASKS, SIZE = 7, 3


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}".lstrip("."): child.get_parameter(name)
        for path, child in module.named_modules()
        for name in getattr(child, "per_task_parameters", ())
    }


class Stack(nn.Module):
    """A number per task and one for all."""

    per_task_parameters = ("own",)
    per_task_buffers = ("note",)
    note: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(TASKS, 2, dtype=torch.float64))
        self.common = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("note", torch.zeros(TASKS))


def test_every_task_has_an_adam_of_its_own() -> None:
    """Against one ``torch.optim.Adam`` per task that steps when it is the task's turn."""
    torch.manual_seed(1)
    stack = Stack()
    adam = torch.optim.Adam(stack.parameters(), lr=0.1, fused=True)
    subset = TaskSubset(TASKS, SIZE, [stack], [], [adam])
    alone = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(TASKS)]
    adams = [torch.optim.Adam([parameter], lr=0.1) for parameter in alone]
    for _ in range(5 * subset.turns):
        goal = torch.randn(TASKS, 2, dtype=torch.float64)
        before = stack.own.detach().clone()
        with subset.turn() as ids:
            assert ids is not None
            adam.zero_grad()
            (stack.own - goal[ids]).square().sum().backward()
            adam.step()
            stack.note += 1.0
        others = [task for task in range(TASKS) if task not in ids.tolist()]
        assert torch.equal(stack.own.detach()[others], before[others])
        for task in ids.tolist():
            adams[task].zero_grad()
            (alone[task] - goal[task]).square().sum().backward()
            adams[task].step()
    torch.testing.assert_close(stack.own.detach(), torch.stack([p.detach() for p in alone]), rtol=1e-12, atol=1e-12)
    assert stack.note.tolist() == [5.0] * TASKS
    for name in ("exp_avg", "exp_avg_sq"):
        expected = torch.stack([adams[task].state[alone[task]][name] for task in range(TASKS)])
        torch.testing.assert_close(adam.state[stack.own][name], expected, rtol=1e-12, atol=1e-12)


def test_fresh_moments_count_from_their_own_beginning() -> None:
    """What the optimiser forgets, such as an absorbed layer's moments, starts with Adam's correction anew."""
    stack = Stack()
    adam = torch.optim.Adam([stack.own], lr=0.1, fused=True)
    subset = TaskSubset(TASKS, TASKS - 1, [stack], [], [adam])

    def one_pass() -> Tensor:
        before = stack.own.detach().clone()
        for _ in range(subset.turns):
            with subset.turn():
                stack.own.grad = torch.ones_like(stack.own)
                adam.step()
        return before - stack.own.detach()

    for _ in range(50):
        one_pass()
    adam.state.clear()
    torch.testing.assert_close(one_pass(), torch.full_like(stack.own, 0.1))  # Adam's first step is the rate


def test_moments_from_before_there_were_windows_keep_their_age() -> None:
    stack = Stack()
    adam = torch.optim.Adam([stack.own], lr=0.1, fused=True)
    for _ in range(10):
        stack.own.grad = torch.ones_like(stack.own)
        adam.step()
    subset = TaskSubset(TASKS, SIZE, [stack], [], [adam])
    before = stack.own.detach().clone()
    for _ in range(subset.turns):
        with subset.turn():
            stack.own.grad = torch.ones_like(stack.own)
            adam.step()
            assert int(adam.state[stack.own]["step"]) == 11
    torch.testing.assert_close(before - stack.own.detach(), torch.full_like(before, 0.1))  # as ever on one gradient


def test_an_error_inside_leaves_all_stacks_whole() -> None:
    stack = Stack()
    subset = TaskSubset(TASKS, SIZE, [stack], [], [])
    shapes = []

    def fail() -> None:
        with subset.turn():
            shapes.append(stack.own.shape)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert shapes == [(SIZE, 2)]
    assert stack.own.shape == (TASKS, 2)
    assert stack.note.shape == (TASKS,)
    assert active_tasks() is None


def test_windows_are_of_nearly_equal_size_and_go_on_where_they_were() -> None:
    torch.manual_seed(2)
    subset = TaskSubset(TASKS, SIZE, [Stack()], [], [])
    assert subset.turns == 3
    sizes = []
    for _ in range(4):
        with subset.turn() as ids:
            assert ids is not None
            sizes.append(len(ids))
    assert sorted(sizes[:3]) == [2, 2, 3]
    resumed = TaskSubset(TASKS, SIZE, [Stack()], [], [])
    resumed.load_state(subset.state())
    with subset.turn() as expected:
        assert expected is not None
    with resumed.turn() as ids:
        assert ids is not None
        assert torch.equal(ids, expected)


def test_as_many_tasks_as_there_are_is_no_subset() -> None:
    subset = TaskSubset(TASKS, TASKS + 1, [Stack()], [], [])
    with subset.turn() as ids:
        assert ids is None
        assert active_tasks() is None


ENV = PointMassConfig(envs_per_task=2)  # eight tasks
OPTIONS = SACConfig(
    replay_capacity_per_task=200,
    batch_per_task=8,
    start_transitions_per_task=20,
    tasks_per_update=3,
    normalize_observations=True,
    reward_scale=RewardScale.return_std,
)


def make_sac(critic: CriticConfig, **options: Any) -> SAC:
    _, engine, learner = build(ENV, replace(OPTIONS, **options), VarShareLoRAConfig(hidden=[8]), critic=critic)
    assert isinstance(learner, SAC)
    collect(engine, learner, torch.from_numpy(engine.reset()), 30)
    return learner


def stacks(learner: SAC) -> dict[str, Tensor]:
    """Everything that is kept per task, ``[T, ...]``."""
    modules = {"actor": learner.actor, "critic": learner.critic, "target": learner.target_critic}
    found = {
        f"{part}.{path}": parameter.detach().clone()
        for part, module in modules.items()
        for path, parameter in own_parameters(module).items()
    }
    statistics = learner.critic.statistics
    if statistics is not None:
        found |= {f"statistics.{name}": statistics.get_buffer(name).clone() for name in statistics.per_task_buffers}
    return found | {"log_alpha": learner.log_alpha.detach().clone()}


@pytest.mark.parametrize("popart", [False, True])
def test_an_update_of_sac_moves_the_tasks_of_its_window_and_no_other(popart: bool) -> None:
    learner = make_sac(CriticConfig(popart=popart))
    for _ in range(4):  # into the second pass
        before, turn = stacks(learner), learner.task_subset.next
        shared = [layer.theta.detach().clone() for layer in learner.actor.modules() if hasattr(layer, "theta")]
        learner.update()
        ids = learner.task_subset.order.tensor_split(learner.task_subset.turns)[turn]
        others = [task for task in range(8) if task not in ids.tolist()]
        for name, after in stacks(learner).items():
            assert torch.equal(after[others], before[name][others]), name
            moved = (
                (after[ids] != before[name][ids]).flatten(1).any(1) if after.dim() > 1 else after != before[name]
            )
            unused = name.startswith("target.") and "rhos_" in name  # targets are of means
            assert bool(moved.any()) != unused, name
        now = [layer.theta for layer in learner.actor.modules() if hasattr(layer, "theta")]
        assert not any(torch.equal(old, new) for old, new in zip(shared, now, strict=True))
        assert torch.equal(learner.task_ids, torch.arange(8))


def test_a_window_of_all_tasks_updates_as_without() -> None:
    whole, windowed = (
        make_sac(CriticConfig(), tasks_per_update=None),
        make_sac(CriticConfig(), tasks_per_update=8),
    )
    for learner in (whole, windowed):
        torch.manual_seed(3)
        learner.update()
    assert all(torch.equal(a, b) for a, b in zip(stacks(whole).values(), stacks(windowed).values(), strict=True))


def test_a_loss_that_is_not_finite_is_counted_for_its_task() -> None:
    learner = make_sac(CriticConfig())
    learner.log_alpha.data[5] = torch.nan
    for _ in range(learner.task_subset.turns):
        learner.update()
    assert [int(steps) for steps in learner.masked_steps()] == [0, 0, 0, 0, 0, 2, 0, 0]
    assert all(torch.isfinite(parameter).all() for parameter in learner.actor.parameters())


def test_gradients_are_predicted_for_the_windows_tasks_only() -> None:
    whole = make_sac(CriticConfig(), tasks_per_update=None).memory_bytes()["networks"]
    windowed = make_sac(CriticConfig(), tasks_per_update=2)
    own = sum(p.numel() for module in (windowed.actor, windowed.critic) for p in own_parameters(module).values())
    assert whole - windowed.memory_bytes()["networks"] == 4 * own * 6 // 8


@pytest.mark.parametrize(
    ("overrides", "few"),
    [
        ((), True),
        (("network=shared",), False),
        (("gradient.critic=pcgrad",), False),
        (("elbo/schedule=dual",), False),
        (("algorithm.tasks_per_update=8",), False),
    ],
)
def test_an_update_of_very_many_tasks_is_of_a_few_unless_that_is_refused_or_of_no_use(
    command: Command, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], few: bool
) -> None:
    """The first screen says so, and a checkpoint goes on with the turns."""
    monkeypatch.setattr(sac, "MOST_AT_ONCE", 3)
    run = (*TINY, *TINY_ALGORITHM["sac"], "network.hidden=[8]", *overrides, "total_transitions=640")
    outcome = command("train", *run, "log.quiet=false", "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert ("updates" in outcome.out and "of 3 tasks in turn" in outcome.out) == few
    assert (newest_checkpoint(Path("run"))[1]["algorithm"]["window"]["passes"] > 0) == few
