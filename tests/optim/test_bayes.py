"""A regression whose posterior is known, trained by the project's own step at the rates of PPO and SAC."""

from __future__ import annotations

import pytest
import torch

from varshare_rl.algorithms.ppo import PPOConfig
from varshare_rl.algorithms.sac import SACConfig
from varshare_rl.nn import VarShareLayer
from varshare_rl.ops.gaussian import softplus_sigma
from varshare_rl.optim.elbo import Elbo, ElboConfig
from varshare_rl.optim.gradient import GradientConfig
from varshare_rl.optim.optimizer import OptimizerConfig
from varshare_rl.optim.step import LossStep

ROWS, FEATURES, NOISE, PRIOR = 32, 4, 0.2, 0.05
PPO, SAC = PPOConfig(), SACConfig()
#: Learning rate, bound on norms and epsilon that the algorithms give their steps.
SETTINGS = {
    "ppo": (PPO.learning_rate, PPO.max_grad_norm, 1e-5),
    "sac": (SAC.learning_rate, SAC.max_grad_norm, 1e-8),
}


FAST = [(1, "mean", "ppo"), (10, "mean", "sac")]
CASES = [
    (tasks, name, algorithm)
    for tasks in (1, 10, 50)
    for name in ("mean", "fairgrad", "pcgrad")
    for algorithm in SETTINGS
]


@pytest.mark.parametrize(
    ("tasks", "aggregator", "algorithm"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_the_posterior_of_a_regression_is_reached(tasks: int, aggregator: str, algorithm: str) -> None:
    """``y = x (theta + phi_i) + noise`` with orthogonal inputs, for which the exact posterior is a product.

    Precision ``1 / p^2 + n / s^2`` and mean ``x^T (y - x theta) / s^2`` over it, given the theta that was learnt.
    The loss is the mean negative log-likelihood and the ELBO's penalty at a weight of 1.
    """
    rate, bound, epsilon = SETTINGS[algorithm]
    basis, _ = torch.linalg.qr(torch.randn(tasks, ROWS, FEATURES))
    x = basis * ROWS**0.5
    truth = 0.5 * torch.randn(1, FEATURES, 1) + PRIOR * torch.randn(tasks, FEATURES, 1)
    y = x @ truth + NOISE * torch.randn(tasks, ROWS, 1)
    layer = VarShareLayer(FEATURES, 1, tasks, prior_scale=PRIOR, bias=False)
    step = LossStep(
        layer, rate, bound, epsilon, OptimizerConfig(), aggregator=aggregator, gradient=GradientConfig(),
        num_tasks=tasks,
    )  # fmt: skip
    elbo, ids = Elbo(ElboConfig(kl_weight=1.0), tasks), torch.arange(tasks)
    steps = round(2.2 / rate)
    kept: list[tuple[torch.Tensor, ...]] = []
    for number in range(steps):
        losses = (y - layer(x, ids)).square().mean((1, 2)) / (2 * NOISE**2)
        step(losses + elbo.penalty(layer, ROWS))
        if number >= steps * 2 // 3 and number % 5 == 0:
            kept.append(
                tuple(part.detach().clone() for part in (layer.mus, softplus_sigma(layer.rhos), layer.theta))
            )
    mus, sigmas, theta = (torch.stack(parts).mean(0) for parts in zip(*kept, strict=True))
    precision = 1 / PRIOR**2 + ROWS / NOISE**2
    exact = (x.transpose(1, 2) @ (y - x @ theta.t()) / NOISE**2 / precision).transpose(1, 2)
    assert (sigmas.mean((1, 2)) * precision**0.5).sub(1).abs().max() < 0.05  # every task's standard deviation
    assert ((mus - exact).abs() * precision**0.5).max() < 0.05  # of that
