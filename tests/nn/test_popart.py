from __future__ import annotations

import numpy as np
import pytest
import torch

from varshare_rl.nn.critic import LARGEST_STD, LEAST_STD, TargetStatistics, TaskAffine, rows

RATE = 0.1


def test_statistics_per_task_equal_numpy() -> None:
    """The forgetting mean is a weighted mean of all batches with weights ``(1 - rate)^age``, which sum to 1."""
    statistics = TargetStatistics(3, RATE)
    generator = np.random.default_rng(0)
    scale, middle = np.array([1.0, 100.0, 1e4])[:, None], np.array([-3.0, 0.0, 5e4])[:, None]
    seen = []
    for count in range(1, 30):
        seen.append(generator.normal(size=(3, 50)) * scale * (1 + count / 10) + middle * count / 10)
        statistics.update(torch.from_numpy(seen[-1]))
        weights = (1 - RATE) ** np.arange(count)[::-1]
        weights /= weights.sum()
        mean = np.einsum("k,ktb->t", weights, np.stack(seen)) / 50
        second = np.einsum("k,ktb->t", weights, np.square(np.stack(seen))) / 50
        np.testing.assert_allclose(statistics.mean.numpy(), mean, rtol=1e-10)
        np.testing.assert_allclose(statistics.std.numpy(), np.sqrt(second - mean**2), rtol=1e-8)


def test_the_first_batch_sets_the_statistics_and_moves_nothing() -> None:
    statistics = TargetStatistics(2, 0.003)
    assert statistics.mean.tolist() == [0.0, 0.0]
    assert statistics.std.tolist() == [1.0, 1.0]
    target = torch.tensor([[1.0, 3.0], [-10.0, 30.0]])
    move = statistics.update(target)
    torch.testing.assert_close(statistics.mean, torch.tensor([2.0, 10.0]).double())
    torch.testing.assert_close(statistics.std, torch.tensor([1.0, 20.0]).double())
    assert move.ratio.tolist() == [1.0, 1.0]
    assert move.shift.tolist() == [0.0, 0.0]
    assert statistics.update(target + 1).ratio[1] != 1.0


@pytest.mark.parametrize(("size", "bound"), [(0.0, LEAST_STD), (1e9, LARGEST_STD)])
def test_the_standard_deviation_has_a_floor_and_a_ceiling(size: float, bound: float) -> None:
    statistics = TargetStatistics(1, 0.5)
    for _ in range(3):
        statistics.update(torch.tensor([[-size, size]]) + 7)
    assert statistics.std.tolist() == [bound]


def test_normalize_and_restore_are_inverses() -> None:
    statistics = TargetStatistics(2, 0.5)
    target = torch.randn(2, 40, dtype=torch.float64) * torch.tensor([[1.0], [1e4]]).double() + 7
    statistics.update(target)
    normal = statistics.normalize(target, torch.arange(2))
    torch.testing.assert_close(normal.mean(1), torch.zeros(2).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(normal.std(1, correction=0), torch.ones(2).double())
    torch.testing.assert_close(statistics.restore(normal, torch.arange(2)), target, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(statistics.normalize(target[1:], torch.tensor([1])), normal[1:])
    torch.testing.assert_close(statistics.normalize(target[1], 1), normal[1])


def test_the_affine_map_is_the_identity_at_first_and_of_its_own_task() -> None:
    affine, x = TaskAffine(3), torch.randn(3, 5)
    assert torch.equal(affine(x, torch.arange(3)), x)
    with torch.no_grad():
        affine.scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
        affine.offset.copy_(torch.tensor([0.0, 0.5, -1.0]))
    torch.testing.assert_close(affine(x, torch.arange(3))[1], 2 * x[1] + 0.5)
    order = torch.tensor([2, 0])
    torch.testing.assert_close(affine(x[order], order), affine(x, torch.arange(3))[order])
    torch.testing.assert_close(affine(x[2], 2), 3 * x[2] - 1)
    assert rows(affine.scale, torch.arange(3), x).shape == (3, 1)


def test_a_flat_batch_has_each_row_in_its_own_task() -> None:
    statistics, affine = TargetStatistics(3, 0.5), TaskAffine(3)
    statistics.update(torch.randn(3, 20) * torch.tensor([[1.0], [10.0], [100.0]]))
    with torch.no_grad():
        affine.scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
    x, ids = torch.randn(5), torch.tensor([2, 0, 0, 1, 2])
    for function in (statistics.restore, statistics.normalize, affine):
        alone = [function(x[row], int(task)) for row, task in enumerate(ids)]
        torch.testing.assert_close(function(x, ids), torch.stack(alone))
    x = torch.randn(3)  # as many rows as tasks, and in their order
    torch.testing.assert_close(affine(x, torch.arange(3)), x * torch.tensor([1.0, 2.0, 3.0]))


def test_a_target_that_is_not_finite_does_not_count() -> None:
    statistics, other = TargetStatistics(2, RATE), TargetStatistics(2, RATE)
    batches = torch.randn(4, 2, 10)
    for number, batch in enumerate(batches):
        spoilt = batch.clone()
        if number in (0, 2):
            spoilt[1, 3] = float("inf") if number else float("nan")
        move = statistics.update(spoilt)
        other.update(batch)
        if number == 2:
            assert [value[1].item() for value in move] == [1.0, 0.0]
    assert torch.equal(statistics.mean[0], other.mean[0])
    assert torch.equal(statistics.std[0], other.std[0])
    alone = TargetStatistics(1, RATE)
    for number in (1, 3):
        alone.update(batches[number, 1:])
    assert torch.equal(statistics.mean[1:], alone.mean)
    assert torch.equal(statistics.std[1:], alone.std)
