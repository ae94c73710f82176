from __future__ import annotations

import pytest
import torch

from varshare_rl.optim.gradnorm import GradNorm, GradNormConfig

#: Rows of norm 1 and 3.
ROWS = torch.tensor([[1.0, 0.0], [0.0, 3.0]])


def test_the_first_step_by_hand() -> None:
    """Weighted norms 1 and 3, their mean 2: the first weight is to rise and the second to fall, by Adam's rate."""
    aggregator = GradNorm(GradNormConfig(learning_rate=0.1), 2)
    assert aggregator(ROWS, torch.ones(2), None).tolist() == [1.0, 3.0]  # with weights of 1
    assert aggregator.weights.tolist() == pytest.approx([1.1, 0.9])
    assert aggregator(ROWS, torch.ones(2), None).tolist() == pytest.approx([1.1, 2.7])


def test_norms_become_equal_and_weights_sum_to_the_number_of_tasks() -> None:
    aggregator = GradNorm(GradNormConfig(), 2)
    for _ in range(300):
        combined = aggregator(ROWS, torch.ones(2), None)
    assert aggregator.weights.sum().item() == pytest.approx(2.0)
    assert combined.tolist() == pytest.approx([1.5, 1.5], rel=0.1)


def test_a_task_that_lags_behind_gets_more() -> None:
    aggregator = GradNorm(GradNormConfig(asymmetry=1.0), 2)
    rows = torch.eye(2)
    aggregator(rows, torch.tensor([1.0, 4.0]), None)
    for _ in range(300):
        combined = aggregator(rows, torch.tensor([0.9, 1.2]), None)  # shares left: 0.9 and 0.3, rates 1.5 and 0.5
    assert (combined[0] / combined[1]).item() == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("losses", [[-0.5, 1.0], [1.0, 0.0]])
def test_a_loss_that_is_not_positive_has_no_rate(losses: list[float]) -> None:
    one, other = (GradNorm(GradNormConfig(asymmetry=asymmetry), 2) for asymmetry in (0.0, 2.0))
    for aggregator in (one, other):
        for _ in range(3):
            combined = aggregator(ROWS, torch.tensor(losses), None)
        assert torch.isfinite(combined).all()
    torch.testing.assert_close(one.weights, other.weights)


def test_a_task_that_is_left_out_keeps_its_share() -> None:
    aggregator = GradNorm(GradNormConfig(), 3)
    rows = torch.diag(torch.tensor([1.0, 3.0, 0.0]))
    for _ in range(200):
        aggregator(rows, torch.ones(3), torch.tensor([True, True, False]))
    assert aggregator.weights[0] > 2 * aggregator.weights[1]
    assert aggregator.weights[2].item() == pytest.approx(1.0, rel=0.3)
    assert aggregator.weights.min() > 0


def test_it_goes_on_from_its_state_and_starts_again_when_it_forgets() -> None:
    aggregator = GradNorm(GradNormConfig(), 2)
    aggregator(ROWS, torch.ones(2), None)
    other = GradNorm(GradNormConfig(), 2)
    other.load_state(aggregator.state())
    assert torch.equal(other(ROWS, torch.ones(2), None), aggregator(ROWS, torch.ones(2), None))
    other.forget()
    assert other.state()["weights"].tolist() == [1.0, 1.0]
    assert other(ROWS, torch.ones(2), None).tolist() == [1.0, 3.0]


def test_a_former_checkpoint_of_before_the_first_step() -> None:
    aggregator = GradNorm(GradNormConfig(), 2)
    aggregator.load_state({"weights": None})
    assert aggregator(ROWS, torch.ones(2), None).tolist() == [1.0, 3.0]
