"""IVON against its authors' package, against posteriors that are known, and through a run."""

from __future__ import annotations

from pathlib import Path

import ivon
import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM
from torch import Tensor

from varshare_rl.assemble import load_agent
from varshare_rl.config import Device
from varshare_rl.nn import SharedConfig, VarShareLayer, VarShareLoRAConfig
from varshare_rl.nn.config import Posterior, PosteriorStart
from varshare_rl.nn.stochastic import WeightNoise
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.ops.gaussian import inverse_softplus, posterior_kl, softplus_sigma
from varshare_rl.optim.elbo import Elbo, ElboConfig
from varshare_rl.optim.ivon import Ivon, IvonConfig
from varshare_rl.optim.optimizer import OptimizerConfig, PosteriorOptimizer
from varshare_rl.optim.step import LossStep
from varshare_rl.optim.task_subset import TaskSubset

TASKS, ROWS, FEATURES, PRIOR = 3, 16, 4, 0.4
NEWTON = IvonConfig(rate=0.1, width=0.5, beta_2=0.9, bound=1e9)


def layer_of(tasks: int = TASKS) -> VarShareLayer:
    layer = VarShareLayer(FEATURES, 1, tasks, prior_scale=PRIOR, bias=False).double()
    torch.nn.init.zeros_(layer.theta)
    with torch.no_grad():
        layer.rhos.copy_(inverse_softplus(torch.full_like(layer.rhos, PRIOR)))
    return layer


def loss_of(layer: VarShareLayer, x: Tensor, y: Tensor, price: Tensor, ids: Tensor) -> Tensor:
    """A curved loss with its divergence."""
    misfit = (y - torch.tanh(layer(x, ids))).square().mean((1, 2))
    return misfit + price * posterior_kl(layer.posteriors(), [layer.log_prior_scale])


def test_steps_are_those_of_the_authors_package() -> None:
    """``ivon-opt``, one per task with ``ess = 1 / c`` and ``weight_decay = c / p^2``, under the same noise."""
    price = torch.tensor([0.01, 0.05, 0.2], dtype=torch.float64)
    x, y = torch.randn(TASKS, ROWS, FEATURES).double(), torch.randn(TASKS, ROWS, 1).double()
    layer, ids = layer_of(), torch.arange(TASKS)
    mine = Ivon([layer], NEWTON)
    mine.pay(price)
    with torch.no_grad():  # as after the first step, which narrows
        layer.rhos.copy_(inverse_softplus(NEWTON.width * torch.full_like(layer.rhos, PRIOR)))
    weights = [torch.nn.Parameter(torch.zeros(1, FEATURES, dtype=torch.float64)) for _ in ids]
    theirs = [
        ivon.IVON(
            [weight], lr=NEWTON.rate, ess=1 / float(cost),
            hess_init=float(cost / PRIOR**2 * (1 / NEWTON.width**2 - 1)), beta1=NEWTON.beta_1,
            beta2=NEWTON.beta_2, weight_decay=float(cost / PRIOR**2), rescale_lr=False,
        )
        for weight, cost in zip(weights, price, strict=True)
    ]  # fmt: skip
    for _ in range(40):
        noise = torch.randn(TASKS, 1, FEATURES).double()
        for task, (weight, optimizer) in enumerate(zip(weights, theirs, strict=True)):
            mean = weight.detach().clone()
            torch.manual_seed(task)
            with optimizer.sampled_params(train=True):
                sigma = softplus_sigma(layer.rhos[task]).detach()
                noise[task] = (weight.detach() - mean) / sigma
                optimizer.zero_grad()
                torch.autograd.backward((y[task] - torch.tanh(x[task] @ weight.t())).square().mean())
            optimizer.step()
        layer.noise = WeightNoise((noise,))
        mine.zero_grad()
        torch.autograd.backward(loss_of(layer, x, y, price, ids).sum())
        mine.step()
        torch.testing.assert_close(layer.mus.detach(), torch.stack([weight.detach() for weight in weights]))
        curvature = torch.stack([optimizer.param_groups[0]["hess"] for optimizer in theirs])
        torch.testing.assert_close(mine.state[layer.mus]["curvature"].flatten(1), curvature)


@pytest.mark.parametrize("tasks", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_the_posterior_of_a_regression_is_reached(tasks: int) -> None:
    """Through the project's step and penalty: ``y = x (theta + phi_i) + noise`` with orthogonal inputs."""
    noise, prior, rows = 0.2, 0.05, 32
    basis, _ = torch.linalg.qr(torch.randn(tasks, rows, FEATURES))
    x = basis * rows**0.5
    truth = 0.5 * torch.randn(1, FEATURES, 1) + prior * torch.randn(tasks, FEATURES, 1)
    y = x @ truth + noise * torch.randn(tasks, rows, 1)
    layer = VarShareLayer(FEATURES, 1, tasks, prior_scale=prior, bias=False)
    chosen = OptimizerConfig(posteriors=PosteriorOptimizer.ivon, ivon=IvonConfig(rate=0.1, beta_2=0.995))
    step = LossStep(layer, 1e-3, 0.5, optimizer=chosen, num_tasks=tasks)
    assert step.ivon is not None
    elbo, ids, kept = Elbo(ElboConfig(kl_weight=1.0), tasks), torch.arange(tasks), []
    for number in range(3000):
        losses = (y - layer(x, ids)).square().mean((1, 2)) / (2 * noise**2)
        step.ivon.pay(elbo.price(layer, rows))
        step(losses + elbo.penalty(layer, rows))
        if number >= 1500:
            kept.append(
                tuple(part.detach().clone() for part in (layer.mus, softplus_sigma(layer.rhos), layer.theta))
            )
    mus, sigmas, theta = (torch.stack(parts).mean(0) for parts in zip(*kept, strict=True))
    precision = 1 / prior**2 + rows / noise**2
    exact = (x.transpose(1, 2) @ (y - x @ theta.t()) / noise**2 / precision).transpose(1, 2)
    assert (sigmas.mean((1, 2)) * precision**0.5).sub(1).abs().max() < 0.05
    assert ((mus - exact).abs() * precision**0.5).max() < 0.1


def test_every_task_has_an_ivon_of_its_own_when_tasks_take_turns() -> None:
    layer, alone = layer_of(), [layer_of(1) for _ in range(TASKS)]
    mine, single = Ivon([layer], NEWTON), [Ivon([one], NEWTON) for one in alone]
    subset = TaskSubset(TASKS, 2, [layer], [], [mine])
    for _ in range(6 * subset.turns):
        x, y = torch.randn(TASKS, ROWS, FEATURES).double(), torch.randn(TASKS, ROWS, 1).double()
        noise = torch.randn(TASKS, 1, FEATURES).double()
        with subset.turn() as ids:
            assert ids is not None
            price = torch.full((len(ids),), 0.02, dtype=torch.float64)
            layer.noise = WeightNoise((noise[ids],))
            mine.zero_grad()
            torch.autograd.backward(loss_of(layer, x[ids], y[ids], price, torch.arange(len(ids))).sum())
            mine.pay(price)
            mine.step()
        for task in ids.tolist():
            one, optimizer = alone[task], single[task]
            one.noise = WeightNoise((noise[task : task + 1],))
            optimizer.zero_grad()
            row = slice(task, task + 1)
            torch.autograd.backward(loss_of(one, x[row], y[row], price[:1], torch.arange(1)).sum())
            optimizer.pay(price[:1])
            optimizer.step()
    for name in ("mus", "rhos"):
        torch.testing.assert_close(getattr(layer, name), torch.cat([getattr(one, name) for one in alone]))


def test_a_price_that_moves_leaves_widths_within_twice_the_priors() -> None:
    """A loss that curves down, under a price that falls as with data and jumps as a critic's scale may."""
    layer, ids = layer_of(), torch.arange(TASKS)
    mine = Ivon([layer], NEWTON)
    for number in range(200):
        price = torch.full((TASKS,), 10.0 ** (number % 5) / (1 + number), dtype=torch.float64)
        x = torch.randn(TASKS, ROWS, FEATURES).double()
        mine.zero_grad()
        nats = posterior_kl(layer.posteriors(), [layer.log_prior_scale])
        torch.autograd.backward((price * nats - 5.0 * layer(x, ids).square().mean((1, 2))).sum())
        mine.pay(price)
        mine.step()
        assert torch.isfinite(layer.mus).all()
        assert (softplus_sigma(layer.rhos) <= 2.01 * PRIOR).all()


def test_posteriors_begin_narrow_and_everything_else_has_adam() -> None:
    network = VarShareLoRAConfig(hidden=[6]).build(3, 2, 2, Posterior(start=PosteriorStart.prior))
    step = LossStep(network, 0.01, 0.5, optimizer=OptimizerConfig(posteriors=PosteriorOptimizer.ivon))
    assert step.ivon is not None
    held = {id(parameter) for group in step.ivon.param_groups for parameter in group["params"]}
    adam = {id(parameter) for group in step.optimizer.param_groups for parameter in group["params"]}
    assert held | adam == {id(parameter) for parameter in network.parameters()}
    assert not held & adam
    elbo, x = Elbo(ElboConfig(), 2), torch.randn(2, 5, 3)
    step.ivon.pay(elbo.price(network, 5))
    step(network(x, torch.arange(2)).square().mean((1, 2)) + elbo.penalty(network, 5))
    for _, layer in stochastic_layers(network):
        sigma = softplus_sigma(layer.posteriors()[0][1]) / layer.prior_scale.view(-1, 1, 1)
        torch.testing.assert_close(sigma, torch.full_like(sigma, 0.3), rtol=0.05, atol=0)


def test_networks_without_posteriors_have_none() -> None:
    network = SharedConfig(hidden=[6]).build(3, 2, 2, Posterior())
    assert LossStep(network, 0.01, 0.5, optimizer=OptimizerConfig(posteriors=PosteriorOptimizer.ivon)).ivon is None


def test_a_step_on_what_is_not_finite_is_not_made() -> None:
    layer = VarShareLayer(FEATURES, 1, TASKS, prior_scale=PRIOR)
    step = LossStep(layer, 0.01, 0.5, optimizer=OptimizerConfig(posteriors=PosteriorOptimizer.ivon))
    assert step.ivon is not None
    step.ivon.pay(0.1)
    x = torch.full((TASKS, 2, FEATURES), 1e30)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    step(layer(x, torch.arange(TASKS)).square().mean((1, 2)) * 1e-30)  # finite losses with infinite gradients
    after = list(layer.parameters())
    assert all(torch.equal(old, new.detach()) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_a_run_steps_its_posteriors_by_it(command: Command, folder: Path, algorithm: str) -> None:
    run = folder / "run"
    given = [*TINY, *TINY_ALGORITHM[algorithm], "total_transitions=1280", "optimizer.posteriors=ivon"]
    assert command("train", *given, f"run_dir={run}").code == 0
    agent = load_agent(run, "last", Device.cpu).algorithm
    for module in agent.trained_modules().values():
        for _, layer in stochastic_layers(module):
            widths = torch.cat([softplus_sigma(rho.detach()).flatten(1) for _, rho in layer.posteriors()], 1)
            widths = widths / layer.prior_scale.view(-1, 1)
            assert float(widths.mean()) < 0.4  # 1 at the start
            assert float(widths.detach().std()) > 1e-6  # curvature differs
