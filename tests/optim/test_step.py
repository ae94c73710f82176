from __future__ import annotations

import pytest
import torch
from helpers import hold_noise
from torch import nn

from varshare_rl.nn import IndependentConfig, Posterior
from varshare_rl.nn.config import Blocks
from varshare_rl.optim.optimizer import OptimizerConfig, OwnGradients
from varshare_rl.optim.step import LossStep
from varshare_rl.registry import registered


def losses(parameter: nn.Parameter) -> torch.Tensor:
    """Two tasks, gradients 3 and 4 in different coordinates."""
    return torch.stack([3.0 * parameter[0], 4.0 * parameter[1]])


@pytest.mark.parametrize(("bound", "scale"), [(0.0, 1.0), (100.0, 1.0), (0.5, 0.2)])
def test_one_step_is_adam_on_the_clipped_mean(bound: float, scale: float) -> None:
    mine, reference = (nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64)) for _ in range(2))
    adam = torch.optim.Adam([reference], lr=0.1, eps=0.5)
    step = LossStep([mine], 0.1, bound, epsilon=0.5)
    for _ in range(3):
        norm = step(losses(mine))
        assert norm.item() == pytest.approx(2.5)  # of the mean of the tasks, (1.5, 2), before clipping
        assert not norm.requires_grad
        reference.grad = scale * torch.tensor([1.5, 2.0], dtype=torch.float64)
        adam.step()
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)


def test_gradients_do_not_accumulate() -> None:
    parameter = nn.Parameter(torch.ones(2))
    step = LossStep([parameter], 0.1, 0.0)
    assert [step(losses(parameter)).item() for _ in range(3)] == pytest.approx([2.5] * 3)


def test_unused_parameters_stay() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    LossStep([used, unused], 0.1, 1.0)(losses(used))
    assert torch.equal(unused, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))


@pytest.mark.parametrize("name", [name for name in registered("network") if name != "independent"])
def test_the_mean_is_plain_backward_to_the_bit(name: str) -> None:
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        network = registered("network")[name](hidden=[160, 130], layer_norm=True).build(5, 3, 4, Posterior())
        hold_noise(network)
        networks.append(network)
    mine, plain = networks
    alike = OptimizerConfig(own_gradients=OwnGradients.averaged, adapter_epsilon=None, rho_lr_scale=1.0)
    step = LossStep(mine, 0.01, 0.5, optimizer=alike)
    adam = torch.optim.Adam(plain.parameters(), lr=0.01, fused=True)
    x, ids = torch.randn(4, 60, 5), torch.arange(4)
    for _ in range(3):
        norm = step(mine(x, ids).square().mean((1, 2)))
        adam.zero_grad()
        plain(x, ids).square().mean((1, 2)).mean().backward()
        assert torch.equal(norm, nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
        adam.step()
    for one, other in zip(mine.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any(getattr(layer, "recorder", None) for layer in mine.modules())


@pytest.mark.parametrize("own_gradients", OwnGradients)
@pytest.mark.parametrize("blocks", Blocks)
def test_networks_that_share_nothing_step_as_if_alone(own_gradients: OwnGradients, blocks: Blocks) -> None:
    """Also where one task's gradient is far above the bound on its norm and the others' are below."""
    options = IndependentConfig(hidden=[7, 7], layer_norm=True, blocks=blocks)
    together = options.build(5, 3, 4, Posterior())
    alone = [options.build(5, 3, 1, Posterior()) for _ in range(4)]
    for task, network in enumerate(alone):
        own = {name: rows[task : task + 1] for name, rows in together.state_dict().items()}
        network.load_state_dict(own)
    optimizer = OptimizerConfig(own_gradients=own_gradients, weight_decay=0.1)
    step = LossStep(together, 0.01, 0.5, optimizer=optimizer)
    steps = [LossStep(network, 0.01, 0.5, optimizer=optimizer) for network in alone]
    x, weights, ids = torch.randn(4, 60, 5), torch.tensor([0.01, 1e4, 0.1, 1.0]), torch.arange(4)
    for _ in range(3):
        step(weights * together(x, ids).square().mean((1, 2)))
        for task, network in enumerate(alone):
            steps[task](weights[task] * network(x[task : task + 1], ids[:1]).square().mean((1, 2)))
    for task, network in enumerate(alone):
        for mine, theirs in zip(network.parameters(), together.parameters(), strict=True):
            torch.testing.assert_close(mine[0], theirs[task], rtol=1e-4, atol=1e-6)
