"""The ways to draw weights, against many fresh weights drawn in full, one for every example."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from naive import scramble
from torch import Tensor

from varshare_rl.nn import VarShareLayer, VarShareLoRALayer
from varshare_rl.nn.variational import ESTIMATORS

TASKS, IN, OUT = 2, 5, 3
Layer = VarShareLoRALayer | VarShareLayer
LAYERS: dict[str, Callable[[str, int], Layer]] = {
    "varshare_lora": lambda estimator, weight_samples: VarShareLoRALayer(
        IN, OUT, TASKS, rank=2, alpha=3.0, estimator=estimator, weight_samples=weight_samples
    ),
    "varshare": lambda estimator, weight_samples: VarShareLayer(
        IN, OUT, TASKS, estimator=estimator, weight_samples=weight_samples
    ),
}
SAMPLED = [estimator for estimator in ESTIMATORS if estimator != "mean"]


@pytest.fixture(params=list(LAYERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(name: str, estimator: str, weight_samples: int = 1) -> Layer:
    """The same parameters whatever the estimator."""
    torch.manual_seed(3)
    layer = LAYERS[name](estimator, weight_samples).double()
    scramble(layer)
    return layer


def fresh_weights(layer: Layer, draws: int, temperature: float = 1.0) -> Tensor:
    """``draws`` weights of every task, ``[draws, T, G, F]``, built from their definition."""
    factors = [
        mu + F.softplus(rho) * temperature * torch.randn(draws, *mu.shape, dtype=mu.dtype)
        for mu, rho in layer.posteriors()
    ]
    if isinstance(layer, VarShareLayer):
        return layer.theta + factors[0]
    return layer.theta + layer.scale * factors[1] @ factors[0]


def outputs(layer: Layer, x: Tensor, passes: int, rows: int, temperature: float = 1.0) -> Tensor:
    """Outputs ``[passes, T, rows, G]`` for the same input ``x [F]`` in every row."""
    ids = torch.arange(TASKS)
    with torch.no_grad():
        return torch.stack([layer(x.expand(TASKS, rows, IN), ids, temperature) for _ in range(passes)])


@pytest.mark.parametrize("estimator", SAMPLED)
@pytest.mark.parametrize("weight_samples", [1, 3])
def test_mean_and_variance_of_the_output_equal_those_of_fresh_weights(
    name: str, estimator: str, weight_samples: int
) -> None:
    layer = made(name, estimator, weight_samples)
    x = torch.randn(IN, dtype=torch.float64)
    with torch.no_grad():
        expected = fresh_weights(layer, 20_000, 0.7) @ x + layer.bias
    passes, rows = (20, 2_000) if estimator == "local" else (3_000, 6)
    drawn = outputs(layer, x, passes, rows, 0.7).transpose(1, 2).flatten(0, 1)
    independent = len(drawn) if estimator == "local" else passes * weight_samples
    error = (expected.var(0) * (1 / independent + 1 / len(expected))).sqrt()
    assert (error < 0.15 * expected.std(0)).all()  # sharp enough to mean something
    assert ((drawn.mean(0) - expected.mean(0)).abs() < 5 * error).all()
    kurtosis = ((expected - expected.mean(0)) / expected.std(0)).pow(4).mean(0)
    variance_error = expected.var(0) * ((kurtosis - 1) * (1 / independent + 1 / len(expected))).sqrt()
    assert ((drawn.var(0) - expected.var(0)).abs() < 5 * variance_error).all()


def test_local_is_the_whole_distribution_and_not_its_moments_alone() -> None:
    """The output of a product of two Gaussian matrices is no Gaussian; the two stages are exact for it."""
    layer = made("varshare_lora", "local")
    with torch.no_grad():
        for mu, rho in layer.posteriors():
            mu.mul_(0.1)
            rho.fill_(1.0)
    x = torch.randn(IN, dtype=torch.float64)
    with torch.no_grad():
        expected = (fresh_weights(layer, 200_000) @ x + layer.bias)[:, 0, 0]
    drawn = outputs(layer, x, 100, 2_000)[:, 0, :, 0].flatten()
    levels = torch.tensor([0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995], dtype=torch.float64)
    below = (drawn <= expected.quantile(levels).unsqueeze(1)).double().mean(1)
    assert ((below - levels).abs() < 5 * (2 * levels * (1 - levels) / 200_000).sqrt()).all()
    standard = (expected - expected.mean()) / expected.std()
    assert standard.pow(4).mean() > 3.5  # 3 for a Gaussian: the quantiles above would tell


@pytest.mark.parametrize("estimator", SAMPLED)
def test_how_rows_of_one_pass_depend_on_each_other(name: str, estimator: str) -> None:
    layer = made(name, estimator, weight_samples=2)
    x = torch.randn(IN, dtype=torch.float64)
    drawn = outputs(layer, x, 1_500, 4)[:, 0, :, 0]
    centred = drawn - drawn.mean(0)
    correlation = (centred.T @ centred) / len(drawn)
    correlation = correlation / correlation.diag().sqrt().outer(correlation.diag().sqrt())
    same, other = correlation[0, 1].item(), correlation[0, 2].item()
    assert other == pytest.approx(0.0, abs=0.1)  # another particle
    assert same == pytest.approx(1.0 if estimator == "weight" else 0.0, abs=0.1)


def test_an_odd_number_of_rows_is_dealt_to_the_samples(name: str) -> None:
    layer = made(name, "weight", weight_samples=3)
    row = torch.randn(IN, dtype=torch.float64)
    for rows, distinct in ((7, 3), (2, 2), (1, 1)):
        y = layer(row.expand(TASKS, rows, IN), torch.arange(TASKS))
        assert y.shape == (TASKS, rows, OUT)
        assert len({round(value, 9) for value in y[0, :, 0].tolist()}) == distinct
    flat = layer(row.expand(5, IN), torch.tensor([1, 0, 1, 1, 0]))
    assert flat.shape == (5, OUT)


def gradients(layer: Layer, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    loss = (layer(x, torch.arange(TASKS)) - target).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: parameter.grad.clone() for name, parameter in layer.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_the_gradient_is_unbiased(name: str, estimator: str) -> None:
    """Its mean equals that of ``weight``, whose gradient is the plain reparameterisation of the definition."""
    draws, batch = 700, 4
    x = torch.randn(TASKS, batch, IN, dtype=torch.float64)
    target = torch.randn(TASKS, batch, OUT, dtype=torch.float64)
    samples: dict[str, dict[str, list[Tensor]]] = {}
    for kind in ("weight", estimator):
        layer = made(name, kind)
        samples[kind] = {}
        for _ in range(draws):
            for parameter, gradient in gradients(layer, x, target).items():
                samples[kind].setdefault(parameter, []).append(gradient)
    for parameter, values in samples["weight"].items():
        plain, other = torch.stack(values), torch.stack(samples[estimator][parameter])
        error = ((plain.var(0) + other.var(0)) / draws).sqrt()
        assert ((plain.mean(0) - other.mean(0)).abs() < 5.5 * error + 1e-12).all(), parameter


@pytest.mark.parametrize("name", ["varshare_lora"])
def test_local_gradients_vary_at_least_five_times_less(name: str) -> None:
    """On a batch, with sigmas as large as the means."""
    x = torch.randn(TASKS, 64, IN, dtype=torch.float64)
    target = torch.randn(TASKS, 64, OUT, dtype=torch.float64)
    variance = {}
    for kind in ("weight", "local"):
        layer = made(name, kind)
        samples = [torch.cat([g.flatten() for g in gradients(layer, x, target).values()]) for _ in range(200)]
        variance[kind] = torch.stack(samples).var(0).sum().item()
    assert variance["local"] < variance["weight"] / 5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck_with_fixed_randomness(name: str, estimator: str) -> None:
    layer = made(name, estimator, weight_samples=2)
    names = [key for key, _ in layer.named_parameters()]
    x = torch.randn(TASKS, 4, IN, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(0)
        given = dict(zip(names, values, strict=True))
        y: Tensor = torch.func.functional_call(layer, given, (x, torch.arange(TASKS), 0.7))
        return y

    parameters = tuple(parameter for _, parameter in layer.named_parameters())
    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_cold_is_the_mean(name: str) -> None:
    x = torch.randn(TASKS, 4, IN, dtype=torch.float64)
    expected = made(name, "weight").eval()(x, torch.arange(TASKS))
    for estimator in ESTIMATORS:
        assert torch.equal(made(name, estimator)(x, torch.arange(TASKS), 0.0), expected)
        tiny = made(name, estimator)(x, torch.arange(TASKS), 1e-7)
        torch.testing.assert_close(tiny, expected, rtol=0, atol=1e-5)
