from __future__ import annotations

import numpy as np
import pytest
import torch

from varshare_rl.data.normalizers import ObservationNormalizer, RunningMoments


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
    obs = torch.randn(2, 4, 3)
    observations = ObservationNormalizer(2, 3, enabled=False)
    observations.update(obs)
    assert observations(obs) is obs
    assert int(observations.moments.count) == 0
