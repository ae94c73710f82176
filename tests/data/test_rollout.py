from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from varshare_rl.data.rollout import Rollout, RolloutStep

TASKS, ENVS, OBS, ACTION = 2, 3, 4, 2


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


def filled(steps: int, capacity: int = 4) -> Rollout:
    rollout = Rollout(capacity)
    for number in range(steps):
        rollout.add(step(number))
    return rollout


def test_steps_lie_along_dimension_one_with_their_types() -> None:
    rollout = filled(4)
    for name in vars(step(0)):
        expected = torch.stack([vars(step(number))[name] for number in range(4)], 1)
        assert torch.equal(rollout[name], expected), name
        assert rollout[name].dtype == expected.dtype


def test_a_policy_without_draws_stores_none() -> None:
    rollout = Rollout(2)
    rollout.add(replace(step(0), draws=None))
    assert "draws" not in rollout
    assert "obs" in rollout


def test_full_clear_and_fill_again() -> None:
    rollout = filled(3)
    assert not rollout.full
    rollout.add(step(3))
    assert rollout.full
    with pytest.raises(IndexError):
        rollout.add(step(4))
    rollout.clear()
    assert not rollout.full
    for number in range(10, 14):
        rollout.add(step(number))
    assert rollout["reward"][0, :, 0].tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("steps", [0, 2, 4])
def test_state_round_trip_in_the_middle(steps: int) -> None:
    one, other = filled(steps), Rollout(4)
    other.load_state(one.state(), torch.device("cpu"))
    assert other.position == steps
    for number in range(steps, 4):
        one.add(step(number))
        other.add(step(number))
    assert one.full
    assert other.full
    for name in vars(step(0)):
        assert torch.equal(one[name], other[name])
        assert one[name].dtype == other[name].dtype


def test_loaded_steps_are_its_own() -> None:
    one, other = filled(2), Rollout(4)
    other.load_state(one.state(), torch.device("cpu"))
    other["reward"].fill_(9.0)
    assert one["reward"][0, :2, 0].tolist() == [0, 1]


def test_all_fields_are_where_the_observations_are() -> None:
    """Numbers of draws are made on the CPU; a batch takes the same rows of every field."""
    rollout = Rollout(2)
    first = step(0)
    on_device = {name: value.to("meta") for name, value in vars(first).items() if name != "draws"}
    rollout.add(RolloutStep(**on_device, draws=first.draws))
    assert {rollout[name].device.type for name in vars(first)} == {"meta"}
