from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import IN, SAMPLES, TASK_IDS, Learning, UnitGaussian, learn, mlp_spec, task_data, weights

from varshare_rl.transfer.method import StorageCost
from varshare_rl.transfer.methods.ewc import EWC, EWCConfig, Quadratic, diagonal_fisher


def test_fisher_of_a_linear_gaussian_is_the_inputs_second_moment() -> None:
    network = mlp_spec().plain()  # y = W x + b, and d log p / d W_gf = (y_g - mu_g) x_f
    x = torch.randn(1, 12, IN)
    fisher = diagonal_fisher(network, x, UnitGaussian())
    moment = x.square().mean((0, 1)).expand(2, IN)
    torch.testing.assert_close(fisher["layers.0.theta"], moment)
    torch.testing.assert_close(fisher["layers.0.bias"], torch.ones(2))


def test_fisher_squares_the_gradient_of_every_input() -> None:
    network = mlp_spec(8, 8, layer_norm=True, outputs=1).plain()
    x = torch.randn(1, 9, IN)
    expected = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    for row in x[0]:  # with one output of unit variance, F = E (d mu / d theta)^2
        network.zero_grad()
        network(row.view(1, 1, IN), TASK_IDS).sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            expected[name] += parameter.grad.square() / len(x[0])
    fisher = diagonal_fisher(network, x, UnitGaussian())
    assert fisher.keys() == expected.keys()
    for name, value in fisher.items():
        torch.testing.assert_close(value, expected[name])


class Point(nn.Module):
    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)


def test_a_sum_of_quadratics_is_kept_as_one() -> None:
    parts = [
        Quadratic({"theta": torch.rand(5, dtype=torch.float64)}, {"theta": torch.randn(5, dtype=torch.float64)})
        for _ in range(3)
    ]
    for part in parts:
        part.precision["theta"][0] = 0.0  # of no importance to any task
    parts[0].precision["theta"][1] = 0.0
    merged = parts[0].plus(parts[1]).plus(parts[2])
    for _ in range(3):
        point = Point(torch.randn(5, dtype=torch.float64))
        naive = torch.stack([part(point) for part in parts]).sum()
        torch.testing.assert_close(merged(point), naive)
        got, expected = (torch.autograd.grad(value, point.theta)[0] for value in (merged(point), naive))
        torch.testing.assert_close(got, expected)


def test_two_quadratics_by_hand() -> None:
    one, two = (
        Quadratic({"theta": torch.tensor([p])}, {"theta": torch.tensor([c])}) for p, c in [(1.0, 0.0), (3.0, 4.0)]
    )
    merged = one.plus(two)
    assert merged.precision["theta"].item() == 4.0
    assert merged.centre["theta"].item() == 3.0
    assert merged.offset == 12.0  # 1 * 3^2 + 3 * 1^2
    assert merged(Point(torch.tensor([5.0]))).item() == 28.0  # 25 + 3


@pytest.mark.parametrize("online", [False, True])
def test_penalty_is_that_of_the_paper(online: bool) -> None:
    options = EWCConfig(weight=6.0, fisher_samples=SAMPLES, online=online, decay=0.5)
    method = EWC(options, mlp_spec(8, outputs=2))
    fishers, ends = [], []
    for task in range(3):
        learning = Learning(method, task, steps=5)
        learning.run(5)
        seed = torch.get_rng_state()
        chosen = torch.randperm(SAMPLES)  # all inputs are used, but in an order that is drawn
        fishers.append(diagonal_fisher(learning.network, task_data(task)[0][:, chosen], UnitGaussian()))
        ends.append(weights(learning.network))
        torch.set_rng_state(seed)
        learning.finish()
    network = method.begin(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = 0.0
    for name, parameter in weights(network).items():
        if online:
            running = 0.25 * fishers[0][name] + 0.5 * fishers[1][name] + fishers[2][name]
            expected += float((running * (parameter - ends[2][name]).square()).sum())
        else:
            for fisher, end in zip(fishers, ends, strict=True):
                expected += float((fisher[name] * (parameter - end[name]).square()).sum())
    penalty = method.penalty(network, SAMPLES)
    assert isinstance(penalty, Tensor)
    assert penalty.shape == (1,)
    torch.testing.assert_close(penalty.item(), 3.0 * expected, rtol=1e-4, atol=0.0)
    again = EWC(options, method.spec)
    again.load_state(method.state())
    assert again.penalty(network, SAMPLES) == penalty


def test_nothing_is_held_before_the_first_task_ends() -> None:
    method = EWC(EWCConfig(), mlp_spec(8))
    assert method.penalty(method.begin(0), SAMPLES) == 0.0


@pytest.mark.parametrize("online", [False, True])
def test_memory_does_not_grow(online: bool) -> None:
    method = EWC(EWCConfig(fisher_samples=4, online=online), mlp_spec(16))
    network = 4 * (3 * 16 + 16 + 16 * 2 + 2)
    assert method.stored() == StorageCost(network, 0, 0)
    for _ in range(3):
        learn(method, 1, steps=1)
        # importances, and for the sum of quadratics their centre; the latest weights are the other's centre
        assert method.stored() == StorageCost(network, 0, network if online else 2 * network)
