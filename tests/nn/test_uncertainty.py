"""Predictive moments: closed forms, drawn weights and first order against each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from naive import scramble
from torch import Tensor, nn

from varshare_rl.nn import (
    Posterior,
    SharedConfig,
    VarShareConfig,
    VarShareLayer,
    VarShareLoRAConfig,
    VarShareLoRALayer,
)
from varshare_rl.nn.actor import CategoricalActor, GaussianActor
from varshare_rl.nn.critic import CriticConfig, TwinQ, ValueNetwork
from varshare_rl.nn.uncertainty import (
    draw_weights,
    layer_moments,
    linearised,
    predict_actions,
    predict_values,
    sample_outputs,
)

TASKS = 3
ALL = torch.arange(TASKS)


def layer(kind: str) -> VarShareLoRALayer | VarShareLayer:
    made: VarShareLoRALayer | VarShareLayer
    made = VarShareLoRALayer(5, 4, TASKS, rank=2, alpha=3.0) if kind == "lora" else VarShareLayer(5, 4, TASKS)
    scramble(made.double())
    return made


def network(kind: str, inputs: int, outputs: int, rho: float, hidden: int = 16) -> nn.Module:
    options = (
        VarShareLoRAConfig(hidden=[hidden, hidden], rank=4)
        if kind == "lora"
        else VarShareConfig(hidden=[hidden, hidden])
    )
    made = options.build(inputs, outputs, TASKS, Posterior()).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "rhos" in name:
                parameter.fill_(rho)
            elif "mus" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_moments_of_a_layer_are_those_of_weights_drawn_in_full(kind: str, temperature: float) -> None:
    made, draws = layer(kind), 60_000
    x = torch.randn(TASKS, 2, 5, dtype=torch.float64)

    def drawn(mus: Tensor, rhos: Tensor) -> Tensor:
        noise = torch.randn(draws, *mus.shape, dtype=torch.float64)
        return mus + temperature * F.softplus(rhos) * noise

    with torch.no_grad():
        for task in range(TASKS):
            if isinstance(made, VarShareLoRALayer):
                b, a = drawn(made.mus_B[task], made.rhos_B[task]), drawn(made.mus_A[task], made.rhos_A[task])
                residual = made.scale * b @ a
            else:
                residual = drawn(made.mus[task], made.rhos[task])
            y = x[task] @ (made.theta + residual).mT + made.bias  # [draws, 2, 4]
            moments = layer_moments(made, x, ALL, temperature)
            mean, variance = moments.mean[task], moments.variance[task]
            error = (y.var(0) / draws).sqrt()
            assert ((y.mean(0) - mean).abs() < 4.5 * error).all()
            fourth = (y - y.mean(0)).pow(4).mean(0)
            variance_error = ((fourth - y.var(0).square()) / draws).sqrt()
            assert (variance_error < 0.05 * variance).all()
            assert ((y.var(0) - variance).abs() < 4.5 * variance_error).all()


def test_moments_of_a_layer_by_hand() -> None:
    made = VarShareLoRALayer(1, 1, 1, rank=1, alpha=2.0, bias=False).double()
    with torch.no_grad():
        made.theta.fill_(0.5)
        made.mus_A.fill_(3.0)
        made.mus_B.fill_(-1.0)
        made.rhos_A.fill_(math.log(math.expm1(0.1)))
        made.rhos_B.fill_(math.log(math.expm1(0.2)))
    mean, variance = layer_moments(made, torch.full((1, 1, 1), 2.0, dtype=torch.float64), torch.arange(1))
    assert float(mean) == pytest.approx(0.5 * 2 + 2 * (-1) * 3 * 2)
    # z = A x: mean 6, variance 4 * 0.01; y: 2^2 [ 1 * 0.04 + 0.04 * (36 + 0.04) ]
    assert float(variance) == pytest.approx(4 * (0.04 + 0.04 * 36.04))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_layouts_of_layer_moments(kind: str) -> None:
    made = layer(kind)
    x = torch.randn(7, 5, dtype=torch.float64)
    ids = torch.tensor([2, 0, 0, 1, 2, 1, 0])
    mixed = layer_moments(made, x, ids)
    for row, task in enumerate(ids.tolist()):
        alone = layer_moments(made, x[row : row + 1], task)
        torch.testing.assert_close(mixed.mean[row], alone.mean[0])
        torch.testing.assert_close(mixed.variance[row], alone.variance[0])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_draw_is_one_weight_for_all_rows_of_its_task(kind: str) -> None:
    """Blocks of the batched pass equal passes with these weights one by one, and every row shares them."""
    made = network(kind, 6, 2, -1.0)
    x = torch.randn(TASKS, 4, 6, dtype=torch.float64)
    torch.manual_seed(5)
    drawn = sample_outputs(made, (x,), 3, at_once=3).draws
    assert drawn.shape == (3, TASKS, 4, 2)
    torch.manual_seed(5)
    weights = draw_weights(made, 3)
    for p in range(3):
        for task in range(TASKS):
            hidden = x[task]
            for index, one in enumerate(made.layers):
                of = {
                    name: weights[f"layers.{index}.{name}"][p * TASKS + task]
                    for name in one.per_task_parameters
                    if "mus" in name
                }
                residual = of["mus"] if kind == "full" else one.scale * of["mus_B"] @ of["mus_A"]
                hidden = F.linear(hidden, one.theta + residual, one.bias)
                hidden = torch.tanh(hidden) if index < 2 else hidden
            torch.testing.assert_close(drawn[p, task], hidden)
    assert made.training
    assert (drawn.std(0) > 1e-3).all()
    chunks = sample_outputs(made, (x,), 5, at_once=2)
    assert chunks.draws.shape[0] == 5
    torch.testing.assert_close(chunks.std, chunks.draws.std(0))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_samples_of_one_layer_have_its_moments(kind: str) -> None:
    made, draws = layer(kind), 20_000
    x = torch.randn(TASKS, 2, 5, dtype=torch.float64)
    sampled = sample_outputs(made, (x,), draws, at_once=5_000)
    moments = layer_moments(made, x, ALL)
    assert ((sampled.mean - moments.mean).abs() < 4.5 * (moments.variance / draws).sqrt()).all()
    torch.testing.assert_close(sampled.std.square(), moments.variance, rtol=0.12, atol=0)
    first_order = linearised(made, (x,))
    torch.testing.assert_close(first_order.variance, moments.variance)
    torch.testing.assert_close(first_order.mean, moments.mean)


@pytest.mark.parametrize(
    ("kind", "rho", "tolerance"), [("lora", -5.0, 0.06), ("lora", -3.0, 0.08), ("full", -4.0, 0.06)]
)
def test_linearised_deviation_of_a_network_is_that_of_samples(kind: str, rho: float, tolerance: float) -> None:
    made = network(kind, 6, 2, rho, hidden=32)
    x = torch.randn(TASKS, 20, 6, dtype=torch.float64)
    sampled = sample_outputs(made, (x,), 4_000, at_once=50)
    first_order = linearised(made, (x,))
    ratio = first_order.variance.sqrt() / sampled.std
    assert (ratio - 1).abs().max() < tolerance
    assert not any(parameter.grad is not None for parameter in made.parameters())


@pytest.mark.parametrize("popart", [False, True])
def test_actions_and_values_of_all_heads(popart: bool) -> None:
    critic = CriticConfig(popart=popart)
    target = torch.randn(TASKS, 30) * 7.0 + torch.tensor([[0.0], [5.0], [100.0]])
    obs = torch.randn(TASKS, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    box = predict_actions(GaussianActor(network("lora", 6, 4, -1.0), mask).double(), obs, 12)
    assert box.draws.shape == (12, TASKS, 5, 2)
    assert box.draws.abs().max() <= 1
    assert (box.std[1, :, 1] == 0).all()  # an action that this task does not have
    assert (box.std[0] > 0).all()
    choice = predict_actions(CategoricalActor(network("full", 6, 2, -1.0), mask), obs, 12)
    torch.testing.assert_close(choice.mean.sum(-1), torch.ones(TASKS, 5, dtype=torch.float64))
    assert (choice.mean[1, :, 1] == 0).all()
    single = ValueNetwork(network("lora", 6, 1, -1.0), TASKS, critic).double()
    single.track(target)
    value = predict_values(single, (obs,), 12)
    assert value.mean.shape == value.std.shape == (TASKS, 5)
    twins = TwinQ(lambda: network("lora", 8, 1, -30.0), TASKS, critic).double()
    twins.track(target)
    action = torch.randn(TASKS, 5, 2, dtype=torch.float64)
    both = predict_values(twins, (obs, action), 3)
    assert both.draws.shape == (6, TASKS, 5)
    expected = twins(obs, action, ALL)  # without noise the draws are the two critics' means
    torch.testing.assert_close(both.draws[:3], expected[0].expand(3, -1, -1))
    torch.testing.assert_close(both.draws[3:], expected[1].expand(3, -1, -1))


def test_what_does_not_scatter_is_refused() -> None:
    x = torch.randn(TASKS, 2, 4)
    with pytest.raises(ValueError, match="no layer of this network has a posterior"):
        sample_outputs(SharedConfig(hidden=[4]).build(4, 1, TASKS, Posterior()), (x,), 4)
    with pytest.raises(ValueError, match="at least 2"):
        sample_outputs(VarShareLoRAConfig(hidden=[4]).build(4, 1, TASKS, Posterior()), (x,), 1)
