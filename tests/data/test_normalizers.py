from __future__ import annotations

import numpy as np
import pytest
import torch

from varshare_rl.data.normalizers import (
    AdaptiveRewardScaler,
    ObservationNormalizer,
    ReturnStdScaler,
    RewardScale,
    RunningMoments,
    reward_scaler,
)


def test_moments_equal_numpy_on_all_data() -> None:
    moments, seen = RunningMoments(3, 4), []
    scale = torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    for size in (1, 5, 2, 40, 1, 300):
        batch = torch.randn(3, size, 4) * scale + 10 * scale
        moments.update(batch)
        seen.append(batch.double().numpy())
    everything = np.concatenate(seen, axis=1)
    assert (moments.count == everything.shape[1]).all()
    assert everything.shape[1] == 349
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


def test_what_hardly_moves_is_not_blown_up() -> None:
    normalizer = ObservationNormalizer(1, 2, enabled=True, least_std=0.05)
    obs = torch.tensor([0.001, 0.5]) * torch.randn(1, 5_000, 2) + torch.tensor([0.6, -0.2])
    normalizer.update(obs)
    std = obs[0].std(0, correction=0)
    torch.testing.assert_close(normalizer.std()[0].float(), torch.stack([torch.tensor(0.05), std[1]]))
    expected = (obs - obs.mean(1, keepdim=True)) / torch.stack([torch.tensor(0.05), std[1]])
    torch.testing.assert_close(normalizer(obs), expected, rtol=1e-4, atol=1e-5)


def test_fixed_scales_stay_whatever_is_observed() -> None:
    normalizer = ObservationNormalizer(3, 2, enabled=True)
    normalizer.fix(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.1]))
    obs = torch.rand(3, 4, 2)
    expected = (obs - torch.tensor([1.0, -2.0])) / torch.tensor([0.5, 0.1])
    torch.testing.assert_close(normalizer(obs), expected.clamp(-10, 10))
    normalizer.update(torch.randn(3, 100, 2))
    torch.testing.assert_close(normalizer(obs), expected.clamp(-10, 10))
    restored = ObservationNormalizer(3, 2, enabled=True)
    restored.load_state_dict(normalizer.state_dict())
    assert torch.equal(restored(obs), normalizer(obs))


def test_switched_off_normalisers_change_nothing() -> None:
    obs = torch.randn(2, 4, 3)
    observations = ObservationNormalizer(2, 3, enabled=False)
    observations.update(obs)
    assert torch.equal(observations(obs), obs)
    assert not observations.moments.count.any()


def test_rewards_are_divided_by_the_std_of_the_discounted_return() -> None:
    tasks, envs, steps, discount = 2, 3, 60, 0.9
    generator = np.random.default_rng(0)
    rewards = generator.normal(size=(steps, tasks, envs)) * np.array([1.0, 30.0])[:, None]
    done = generator.random((steps, tasks, envs)) < 0.1
    normalizer = ReturnStdScaler(tasks, discount)
    running, seen = np.zeros((tasks, envs)), []
    for reward, end in zip(rewards, done, strict=True):
        normalizer.update(torch.from_numpy(reward), torch.from_numpy(end), True)
        running = running * discount + reward
        seen.append(running.copy())
        running[end] = 0.0
    std = np.stack(seen, 1).reshape(tasks, -1).std(1)
    x = torch.ones(tasks, 4)
    np.testing.assert_allclose(normalizer(x).numpy(), np.repeat(1 / std[:, None], 4, 1), rtol=1e-5)
    assert normalizer(1e6 * x).tolist() == [[10.0] * 4] * 2  # clipped
    assert normalizer(torch.ones(tasks, 4, 5)).shape == (tasks, 4, 5)


def test_the_scalers_state_comes_back() -> None:
    one, other = ReturnStdScaler(2, 0.9), ReturnStdScaler(2, 0.9)
    for _ in range(5):
        one.update(torch.randn(2, 3), torch.rand(2, 3) < 0.3, True)
    state = one.state_dict()
    other.load_state_dict(state)
    reward, done = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    for normalizer in (one, other):
        normalizer.update(reward, done, True)
    assert torch.equal(one(reward), other(reward))
    assert torch.equal(one.returns, other.returns)


def feed(scaler: AdaptiveRewardScaler, *rewards: list[float], learning: bool = False) -> None:
    reward = torch.tensor(rewards)
    scaler.update(reward, torch.zeros(reward.shape, dtype=torch.bool), learning)


def test_adaptive_scales_by_hand() -> None:
    scaler = AdaptiveRewardScaler(4)
    x = torch.ones(4, 2)
    assert torch.equal(scaler(x), x)  # nothing seen yet
    feed(scaler, [1.0, 3.0], [-8.0, 8.0], [0.0, 0.5], [0.0, 0.0])  # mean sizes 2, 8, 1/4 and none
    expected = torch.tensor([4.0, 1.0, 32.0, 1.0])
    torch.testing.assert_close(scaler(x), expected.unsqueeze(1).expand(4, 2))
    torch.testing.assert_close(scaler(2 * torch.ones(4, 3, 5))[2], torch.full((3, 5), 64.0))
    feed(scaler, [6.0, 6.0], [8.0, 8.0], [0.25, 0.25], [0.0, 0.0])  # over both: 4, 8, 1/4
    torch.testing.assert_close(scaler(x)[:, 0], torch.tensor([2.0, 1.0, 32.0, 1.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_adaptive_scales_of_others_do_not_follow_a_reward_that_is_not_finite(bad: float) -> None:
    scaler = AdaptiveRewardScaler(3)
    feed(scaler, [1.0, 3.0], [8.0, 8.0], [1.0, bad])
    assert scaler(torch.ones(3, 1))[:, 0].tolist() == [4.0, 1.0, 8.0]


def test_adaptive_scales_change_at_a_refresh_only_once_learning_has_begun() -> None:
    scaler, x = AdaptiveRewardScaler(2), torch.ones(2, 1)
    feed(scaler, [1.0], [2.0])
    feed(scaler, [5.0], [2.0], learning=True)
    torch.testing.assert_close(scaler(x)[:, 0], torch.tensor([2.0, 1.0]))
    scaler.refresh()
    torch.testing.assert_close(scaler(x)[:, 0], torch.tensor([1.0, 1.5]))
    other = AdaptiveRewardScaler(2)
    other.load_state_dict(scaler.state_dict())
    for each in (scaler, other):
        feed(each, [100.0], [1.0], learning=each is scaler)  # the other knows from its state
    torch.testing.assert_close(other(x)[:, 0], torch.tensor([1.0, 1.5]))
    for each in (scaler, other):
        each.refresh()
    assert torch.equal(other(x), scaler(x))


def test_no_scale_changes_nothing() -> None:
    scaler, reward = reward_scaler(RewardScale.none, 2, 0.9), torch.randn(2, 4) * 100
    scaler.update(reward, reward > 0, True)
    scaler.refresh()
    assert torch.equal(scaler(reward), reward)
    assert scaler.state_dict() == {}
    assert isinstance(reward_scaler(RewardScale.return_std, 2, 0.9), ReturnStdScaler)
    assert isinstance(reward_scaler(RewardScale.ars, 2, 0.9), AdaptiveRewardScaler)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_leaves_statistics_as_if_it_had_not_come(bad: float) -> None:
    clean = torch.randn(2, 40, 3)
    spoilt = clean.clone()
    spoilt[1, 7, 2] = bad
    moments = RunningMoments(2, 3)
    for part in spoilt.split(10, 1):
        moments.update(part)
    kept = torch.cat([clean[1, :7], clean[1, 8:]]).double()
    assert moments.count.tolist() == [[40.0], [39.0]]
    torch.testing.assert_close(moments.mean, torch.stack([clean[0].double().mean(0), kept.mean(0)]))
    torch.testing.assert_close(moments.std()[1], kept.std(0, unbiased=False))
    for enabled in (True, False):
        normalizer = ObservationNormalizer(2, 3, enabled)
        normalizer.update(spoilt)
        out = normalizer(spoilt)
        assert out.isfinite().all()
        if not enabled:
            assert torch.equal(out[0], clean[0])
            assert out[1, 7, 2] == 0.0


@pytest.mark.parametrize("kind", RewardScale)
def test_one_infinite_reward_scales_nothing(kind: RewardScale) -> None:
    rewards = torch.rand(30, 2, 3) + 0.5
    spoilt = rewards.clone()
    spoilt[4, 1, 0] = float("inf")
    done = torch.zeros(2, 3, dtype=torch.bool)
    scalers = [reward_scaler(kind, 2, 0.9) for _ in range(2)]
    for step in range(30):
        done[:] = step % 7 == 6
        scalers[0].update(rewards[step], done, False)
        scalers[1].update(spoilt[step], done, False)
    clean, hurt = (scaler(rewards[0]) for scaler in scalers)
    torch.testing.assert_close(hurt, clean, rtol=0.2, atol=0)
    assert scalers[1](spoilt[4])[1, 0] == 0.0
    assert scalers[1](spoilt[4]).isfinite().all()


def test_counts_of_former_checkpoints_are_those_of_all_tasks() -> None:
    for module in (RunningMoments(3, 2), reward_scaler(RewardScale.ars, 3, 0.9)):
        state = module.state_dict()
        module.load_state_dict({**state, "count": torch.tensor(7.0, dtype=torch.float64)})
        assert module.count.flatten().tolist() == [7.0] * 3
