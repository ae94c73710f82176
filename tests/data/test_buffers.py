from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from varshare_rl.data.buffers import ReplayBuffer, Rollout, RolloutStep
from varshare_rl.types import Transition

TASKS, ENVS, OBS, ACTION = 3, 2, 4, 2


def step(number: int) -> RolloutStep:
    generator = torch.Generator().manual_seed(number)
    return RolloutStep(
        obs=torch.randn(TASKS, ENVS, OBS, generator=generator),
        raw_action=torch.randn(TASKS, ENVS, ACTION, generator=generator),
        log_prob=torch.randn(TASKS, ENVS, generator=generator),
        reward=torch.full((TASKS, ENVS), float(number)),
        terminated=torch.rand(TASKS, ENVS, generator=generator) < 0.5,
        truncated=torch.rand(TASKS, ENVS, generator=generator) < 0.5,
        next_obs=torch.randn(TASKS, ENVS, OBS, generator=generator),
        draws=torch.randint(9, (TASKS, ENVS), generator=generator),
    )


def rollout_of(steps: int, capacity: int = 4) -> Rollout:
    rollout = Rollout(capacity)
    for number in range(steps):
        rollout.add(step(number))
    return rollout


def test_steps_lie_along_dimension_one_with_their_types() -> None:
    rollout = rollout_of(4)
    for name in vars(step(0)):
        expected = torch.stack([vars(step(number))[name] for number in range(4)], 1)
        assert torch.equal(rollout.fields[name], expected), name
        assert rollout.fields[name].dtype == expected.dtype


def test_a_policy_without_draws_stores_none() -> None:
    rollout = Rollout(2)
    rollout.add(replace(step(0), draws=None))
    assert "draws" not in rollout.fields
    assert "obs" in rollout.fields


def test_full_and_filled_again() -> None:
    rollout = rollout_of(3)
    assert not rollout.full
    rollout.add(step(3))
    assert rollout.full
    with pytest.raises(IndexError):
        rollout.add(step(4))
    rollout.position = 0
    assert not rollout.full
    for number in range(10, 14):
        rollout.add(step(number))
    assert rollout.fields["reward"][0, :, 0].tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("steps", [0, 2, 4])
def test_a_rollout_comes_back_in_the_middle(steps: int) -> None:
    one, other = rollout_of(steps), Rollout(4)
    other.load_state(one.state())
    assert other.position == steps
    for number in range(steps, 4):
        one.add(step(number))
        other.add(step(number))
    assert one.full
    assert other.full
    for name in vars(step(0)):
        assert torch.equal(one.fields[name], other.fields[name])
        assert one.fields[name].dtype == other.fields[name].dtype


def test_loaded_steps_are_the_rollouts_own() -> None:
    one, other = rollout_of(2), Rollout(4)
    other.load_state(one.state())
    other.fields["reward"].fill_(9.0)
    assert one.fields["reward"][0, :2, 0].tolist() == [0, 1]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_cut_episode_is_truncated_at_the_last_step(steps: int) -> None:
    """One that has terminated there stays so; nothing else changes."""
    rollout, before = rollout_of(steps), rollout_of(steps)
    ended = torch.zeros(TASKS, ENVS, dtype=torch.bool)
    ended[1] = True
    rollout.truncate(ended)
    if steps:
        last = before.fields["truncated"][1, steps - 1], before.fields["terminated"][1, steps - 1]
        before.fields["truncated"][1, steps - 1] = last[0] | ~last[1]
    for name in before.fields:
        assert torch.equal(rollout.fields[name], before.fields[name]), name


def test_all_fields_are_on_the_device() -> None:
    """Numbers of draws are made on the CPU; a batch takes the same rows of every field."""
    rollout = Rollout(2, "meta")
    first = step(0)
    on_device = {name: value.to("meta") for name, value in vars(first).items() if name != "draws"}
    rollout.add(RolloutStep(**on_device, draws=first.draws))
    assert {rollout.fields[name].device.type for name in vars(first)} == {"meta"}


def replay(capacity: int = 10) -> ReplayBuffer:
    return ReplayBuffer(TASKS, capacity, OBS, ACTION, torch.device("cpu"))


def transition(number: int, envs: int = ENVS) -> Transition:
    """Every value says which step, task, environment and field it is: ``step * 100 + task * 10 + env``."""
    task, env = torch.meshgrid(torch.arange(TASKS), torch.arange(envs), indexing="ij")
    mark = (number * 100 + task * 10 + env).float()
    return Transition(
        obs=mark.unsqueeze(-1).expand(-1, -1, OBS) + 0.1,
        action=mark.unsqueeze(-1).expand(-1, -1, ACTION) + 0.2,
        reward=mark + 0.3,
        terminated=(mark.long() % 2 == 1),
        truncated=torch.zeros(TASKS, envs, dtype=torch.bool),
        next_obs=mark.unsqueeze(-1).expand(-1, -1, OBS) + 0.4,
    )


def marks(memory: ReplayBuffer) -> list[list[int]]:
    """What each task's filled rows were, in place order."""
    return memory.rows[:, : len(memory), 0].round().int().tolist()


def test_fills_up_and_wraps_around() -> None:
    memory = replay(capacity=5)
    assert len(memory) == 0
    memory.add(transition(0))
    memory.add(transition(1))
    assert len(memory) == 4
    assert marks(memory)[1] == [10, 11, 110, 111]
    memory.add(transition(2))  # one fits at the end, one goes to the start
    assert len(memory) == 5
    assert marks(memory)[0] == [201, 1, 100, 101, 200]
    assert marks(memory)[2] == [221, 21, 120, 121, 220]
    memory.add(transition(3))
    assert marks(memory)[0] == [201, 300, 301, 101, 200]
    for number in range(4, 20):
        memory.add(transition(number))
    assert sorted(marks(memory)[1]) == [1711, 1810, 1811, 1910, 1911]


def test_a_step_as_large_as_the_memory() -> None:
    memory = replay(capacity=3)
    memory.add(transition(0, envs=1))
    memory.add(transition(1, envs=3))
    assert sorted(marks(memory)[0]) == [100, 101, 102]


def test_fields_come_back_together_and_of_their_own_task() -> None:
    memory = replay(capacity=50)
    for number in range(20):
        memory.add(transition(number))
    batch = memory.sample(64)
    assert batch.obs.shape == batch.next_obs.shape == (TASKS, 64, OBS)
    assert batch.action.shape == (TASKS, 64, ACTION)
    assert batch.reward.shape == batch.terminated.shape == (TASKS, 64)
    mark = (batch.reward - 0.3).round()
    torch.testing.assert_close(batch.obs, (mark + 0.1).unsqueeze(-1).expand(-1, -1, OBS))
    torch.testing.assert_close(batch.action, (mark + 0.2).unsqueeze(-1).expand(-1, -1, ACTION))
    torch.testing.assert_close(batch.next_obs, (mark + 0.4).unsqueeze(-1).expand(-1, -1, OBS))
    assert torch.equal(batch.terminated, mark % 2)
    assert torch.equal(mark % 100 // 10, torch.arange(TASKS).unsqueeze(1).expand(-1, 64).float())


def test_draws_are_uniform_and_only_of_what_is_filled() -> None:
    memory = replay(capacity=1000)
    for number in range(5):
        memory.add(transition(number))
    drawn = memory.sample(20_000).reward.round().int()
    for task in range(TASKS):
        values, counts = torch.unique(drawn[task], return_counts=True)
        assert values.tolist() == sorted(marks(memory)[task])
        assert (counts - 2_000).abs().max() < 250  # 10 rows; the standard deviation is 42


def test_a_memory_comes_back_and_goes_on_the_same() -> None:
    one, other = replay(capacity=7), replay(capacity=7)
    for number in range(3):
        one.add(transition(number))
    other.load_state(one.state())
    for memory in (one, other):
        memory.add(transition(8))
        memory.add(transition(9))
    assert marks(one) == marks(other)
    assert (one.position, len(one)) == (other.position, len(other)) == (3, 7)
    torch.manual_seed(3)
    mine = one.sample(5)
    torch.manual_seed(3)
    theirs = other.sample(5)
    assert all(torch.equal(vars(mine)[name], vars(theirs)[name]) for name in vars(mine))


def test_loaded_memory_is_its_own() -> None:
    one, other = replay(), replay()
    one.add(transition(0))
    other.load_state(one.state())
    other.add(transition(5))
    other.rows.zero_()
    assert marks(one)[0] == [0, 1]
    assert one.rows[0, 1, 0].item() > 1
