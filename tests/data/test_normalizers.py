from __future__ import annotations

import numpy as np
import pytest
import torch

from varshare_rl.data.normalizers import ObservationNormalizer, RewardNormalizer, RunningMoments


def test_moments_equal_numpy_on_all_data() -> None:
    moments, seen = RunningMoments(3, 4), []
    scale = torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    for size in (1, 5, 2, 40, 1, 300):
        batch = torch.randn(3, size, 4) * scale + 10 * scale
        moments.update(batch)
        seen.append(batch.double().numpy())
    everything = np.concatenate(seen, axis=1)
    assert int(moments.count) == everything.shape[1] == 349
    np.testing.assert_allclose(moments.mean.numpy(), everything.mean(1), rtol=1e-10)
    np.testing.assert_allclose(moments.std(0.0).numpy(), everything.std(1), rtol=1e-10)


def test_moments_are_stable_far_from_zero() -> None:
    moments = RunningMoments(1, 1)
    for _ in range(100):
        moments.update(torch.randn(1, 100, 1, dtype=torch.float64) * 1e-3 + 1e4)
    assert moments.std(0.0).item() == pytest.approx(1e-3, rel=0.05)


def test_std_before_two_samples_and_its_floor() -> None:
    moments = RunningMoments(1, 2)
    assert moments.std().tolist() == [[1.0, 1.0]]
    moments.update(torch.ones(1, 1, 2))
    assert moments.std().tolist() == [[1.0, 1.0]]
    moments.update(torch.ones(1, 1, 2))
    assert moments.std(floor=0.5).tolist() == [[0.5, 0.5]]


def test_observations_are_normalised_per_task_and_clipped() -> None:
    normalizer = ObservationNormalizer(2, 3, enabled=True, clip=2.0)
    obs = torch.randn(2, 5_000, 3) * torch.tensor([1.0, 50.0])[:, None, None] + 7
    normalizer.update(obs)
    got = normalizer(obs)
    unclipped = got.abs() < 2.0
    expected = (obs - obs.mean(1, keepdim=True)) / obs.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(got[unclipped], expected[unclipped], rtol=1e-4, atol=1e-4)
    assert got.abs().max() == 2.0
    wide = normalizer(obs.view(2, 50, 100, 3))
    assert torch.equal(wide, got.view(2, 50, 100, 3))
    assert got.dtype == torch.float32


def test_switched_off_normalisers_change_nothing() -> None:
    obs, reward = torch.randn(2, 4, 3), torch.randn(2, 4) * 100
    observations = ObservationNormalizer(2, 3, enabled=False)
    observations.update(obs)
    assert observations(obs) is obs
    assert int(observations.moments.count) == 0
    rewards = RewardNormalizer(2, 0.9, enabled=False)
    rewards.update(reward, reward > 0)
    assert rewards(reward) is reward


def test_rewards_are_divided_by_the_spread_of_the_discounted_return() -> None:
    tasks, envs, steps, discount = 2, 3, 60, 0.9
    generator = np.random.default_rng(0)
    rewards = generator.normal(size=(steps, tasks, envs)) * np.array([1.0, 30.0])[:, None]
    done = generator.random((steps, tasks, envs)) < 0.1
    normalizer = RewardNormalizer(tasks, discount, enabled=True)
    running, seen = np.zeros((tasks, envs)), []
    for reward, end in zip(rewards, done, strict=True):
        normalizer.update(torch.from_numpy(reward), torch.from_numpy(end))
        running = running * discount + reward
        seen.append(running.copy())
        running[end] = 0.0
    spread = np.stack(seen, 1).reshape(tasks, -1).std(1)
    x = torch.ones(tasks, 4)
    np.testing.assert_allclose(normalizer(x).numpy(), np.repeat(1 / spread[:, None], 4, 1), rtol=1e-5)
    assert normalizer(1e6 * x).tolist() == [[10.0] * 4] * 2  # clipped
    assert normalizer(torch.ones(tasks, 4, 5)).shape == (tasks, 4, 5)


def test_reward_normaliser_state_round_trip() -> None:
    one, other = RewardNormalizer(2, 0.9, True), RewardNormalizer(2, 0.9, True)
    for _ in range(5):
        one.update(torch.randn(2, 3), torch.rand(2, 3) < 0.3)
    state = one.state_dict()
    other.returns = state["returns"].clone()  # its shape is that of the environments
    other.load_state_dict(state)
    reward, done = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    for normalizer in (one, other):
        normalizer.update(reward, done)
    assert torch.equal(one(reward), other(reward))
    assert torch.equal(one.returns, other.returns)
