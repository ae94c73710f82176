"""Combinations of the tasks' gradients: by hand, and against TorchJD on the whole Jacobian."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchjd import aggregation

from varshare_rl.errors import UserError
from varshare_rl.nn import Posterior, SharedConfig, VarShareLoRAConfig
from varshare_rl.optim.gradient import MEAN, TEMPERATURE, AggregateScale, GradientConfig, gradient_schema
from varshare_rl.optim.gram_weights import FairGradConfig, fair_weights
from varshare_rl.optim.jacobian import GradientAggregator
from varshare_rl.optim.optimizer import OptimizerConfig, OwnGradients
from varshare_rl.optim.step import LossStep
from varshare_rl.optim.torchjd_aggregators import (
    AlignedMTLConfig,
    AlignedScale,
    CAGradConfig,
    NashMTLConfig,
)
from varshare_rl.registry import registered

COMBINERS = [name for name in registered("gradient") if name not in (MEAN, TEMPERATURE)]
THROUGH_TORCHJD = [m for m in COMBINERS if m != "gradnorm"]
#: Gradients of two tasks that conflict: their product is -1.
CONFLICT = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)


def build_aggregator(method: str, tasks: int, **options: Any) -> GradientAggregator:
    aggregator = gradient_schema()(**options).build(method, tasks)
    assert aggregator is not None
    return aggregator


def combine(method: str, jacobian: Tensor, kept: Tensor | None = None, **options: Any) -> Tensor:
    aggregator = build_aggregator(method, len(jacobian), **options)
    return aggregator(jacobian / len(jacobian), torch.ones(len(jacobian), dtype=jacobian.dtype), kept)


def test_pcgrad_by_hand() -> None:
    # (1, 0) loses its part along (-1, 1) and becomes (1/2, 1/2); (-1, 1) becomes (0, 1); their mean
    torch.testing.assert_close(combine("pcgrad", CONFLICT), torch.tensor([0.25, 0.75], dtype=torch.float64))


def test_pcgrad_without_conflict_is_the_mean() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(combine("pcgrad", jacobian), jacobian.mean(0))


def test_cagrad_by_hand() -> None:
    # g_0 = (0, 1/2); the objective falls in w_1 throughout, so g_w = (1, 0): g_0 + c |g_0| g_w / |g_w|
    found = combine("cagrad", CONFLICT, cagrad=CAGradConfig(c=0.4))
    torch.testing.assert_close(found, torch.tensor([0.2, 0.5], dtype=torch.float64), rtol=0, atol=2e-3)
    # by symmetry w = (1/2, 1/2), g_w = g_0 = (0, 1)
    mirrored = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    found = combine("cagrad", mirrored, cagrad=CAGradConfig(c=0.4))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.4], dtype=torch.float64), rtol=0, atol=2e-3)


def test_fairgrad_by_hand() -> None:
    # w_1 (w_1 - w_2) = 1 and w_2 (2 w_2 - w_1) = 1: w_1^2 = 2 + sqrt(2), w_2 = w_1 - 1 / w_1
    first = math.sqrt(2.0 + math.sqrt(2.0))
    second = first - 1.0 / first
    expected = torch.tensor([first - second, second], dtype=torch.float64)
    torch.testing.assert_close(combine("fairgrad", CONFLICT), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_fairgrad_solves_its_equation_at_any_scale(alpha: float, scale: float) -> None:
    jacobian = torch.randn(5, 40, dtype=torch.float64) * scale
    combined = combine("fairgrad", jacobian, fairgrad=FairGradConfig(alpha))
    gains = jacobian @ combined  # G w
    weights = torch.linalg.lstsq(jacobian.t(), combined).solution
    torch.testing.assert_close(gains, weights.pow(-1.0 / alpha), rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("case", ["many", "opposed", "alike", "sizes"])
def test_fairgrad_solves_its_equation_for_awkward_gradients(alpha: float, case: str) -> None:
    """Fifty tasks in few dimensions, two nearly opposed, nearly the same, and of sizes over four decades."""
    common = torch.randn(1, 60, dtype=torch.float64)
    rows = {
        "many": torch.randn(50, 60, dtype=torch.float64),
        "opposed": torch.cat([common, -common + 0.05 * torch.randn(1, 60, dtype=torch.float64)]),
        "alike": common + 1e-4 * torch.randn(10, 60, dtype=torch.float64),
        "sizes": torch.randn(6, 60, dtype=torch.float64)
        * torch.logspace(-2, 2, 6, dtype=torch.float64).unsqueeze(1),
    }[case]
    gramian = rows @ rows.t()
    gramian = gramian / gramian.diagonal().mean()
    weights = fair_weights(gramian, alpha)
    torch.testing.assert_close(gramian @ weights, weights.pow(-1.0 / alpha), rtol=1e-6, atol=0.0)


def torchjd_aggregator(method: str, tasks: int) -> Callable[[Tensor], Tensor]:
    """TorchJD's own on the Jacobian of the losses; of ``losses / T`` for what replaces the sum of gradients."""
    plain: dict[str, Callable[[], Any]] = {
        "pcgrad": aggregation.PCGrad,
        "cagrad": lambda: aggregation.CAGrad(c=0.4),
        "fairgrad": lambda: aggregation.FairGrad(alpha=1.0),
        "nashmtl": lambda: aggregation.NashMTL(tasks),
        "upgrad": aggregation.UPGrad,
        "mgda": aggregation.MGDA,
        "imtlg": aggregation.IMTLG,
        "aligned_mtl": aggregation.AlignedMTL,
        "gradvac": lambda: aggregation.GradVac(beta=0.01),
        "graddrop": aggregation.GradDrop,
    }
    aggregator = plain[method]()
    of_sum = method in ("pcgrad", "gradvac", "graddrop")
    return lambda jacobian: aggregator(jacobian / len(jacobian) if of_sum else jacobian)


@pytest.mark.parametrize("method", THROUGH_TORCHJD)
def test_equals_torchjd_on_the_jacobian(method: str) -> None:
    """Three steps, so that what a method remembers is compared, too."""
    aggregator, reference = build_aggregator(method, 4), torchjd_aggregator(method, 4)
    for step in range(3):
        jacobian = torch.randn(4, 30, dtype=torch.float64) + 0.3 * torch.randn(30, dtype=torch.float64)
        torch.manual_seed(step)
        found = aggregator(jacobian / 4, torch.ones(4), None)
        torch.manual_seed(step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NashMTL's solver
            expected = reference(jacobian)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "method",
    [m for m in THROUGH_TORCHJD if m not in ("nashmtl", "fairgrad", "graddrop")],
)
def test_the_scale_of_the_losses_scales_the_gradient(method: str) -> None:
    """TorchJD's tolerances alone would make CAGrad stop and UPGrad give in where gradients are small."""
    jacobian = torch.randn(3, 20, dtype=torch.float64)
    torch.manual_seed(0)
    found = combine(method, jacobian)
    torch.manual_seed(0)
    torch.testing.assert_close(combine(method, jacobian * 1e-6), found * 1e-6, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", COMBINERS)
def test_a_task_that_is_left_out_does_not_count(method: str) -> None:
    jacobian = torch.randn(4, 30, dtype=torch.float64)
    jacobian[2] = 0.0
    kept = torch.tensor([True, True, False, True])
    torch.manual_seed(0)
    found = combine(method, jacobian, kept)
    assert torch.isfinite(found).all()
    if method in ("nashmtl", "gradvac", "gradnorm"):
        expected = jacobian.sum(0) / 4
    else:
        torch.manual_seed(0)
        others = combine(method, jacobian[kept])
        # FairGrad's weights are no shares: they depend on the others in conflict alone, not on how many there are
        expected = others * (1 if method == "fairgrad" else 3 / 4)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", [m for m in COMBINERS if m != "nashmtl"])
def test_a_task_that_is_left_out_changes_nothing_for_those_it_does_not_meet(method: str) -> None:
    found = []
    for bad in (1.0, float("nan")):
        shared = nn.Parameter(torch.zeros(4))  # a part for each of four tasks
        pair = nn.ParameterList([shared])
        step = LossStep(pair, 0.1, 0.0, aggregator=method, num_tasks=4)
        step((shared + 1.0) * torch.tensor([1.0, 1.0, bad, 1.0]))
        assert shared.grad is not None
        found.append(shared.grad[[0, 1, 3]])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("method", COMBINERS)
def test_no_gradient_at_all_and_gradients_that_are_not_finite(method: str) -> None:
    assert torch.equal(combine(method, torch.zeros(3, 5)), torch.zeros(5))
    broken = torch.randn(3, 5)
    broken[1] = float("nan")
    if method != "graddrop":
        assert not torch.isfinite(combine(method, broken)).all()  # the step then sees it by the norm


def test_options_reach_torchjd() -> None:
    jacobian = torch.randn(3, 20, dtype=torch.float64)
    one, other = (combine("cagrad", jacobian, cagrad=CAGradConfig(c)) for c in (0.1, 0.9))
    assert not torch.allclose(one, other)
    long, short = (combine("nashmtl", jacobian, nashmtl=NashMTLConfig(max_norm=n)) for n in (1.0, 0.1))
    assert (long.norm().item(), short.norm().item()) == pytest.approx((1.0, 0.1), rel=1e-4)
    found = {}
    for scale in AlignedScale:
        found[scale] = combine("aligned_mtl", jacobian, aligned_mtl=AlignedMTLConfig(scale)).norm()
    assert found[AlignedScale.min] < found[AlignedScale.median]
    assert found[AlignedScale.min] < found[AlignedScale.rmse]


class Pair(nn.Module):
    """Two shared numbers and one of each task's own, without layers."""

    per_task_parameters = ("own",)

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(2))
        self.own = nn.Parameter(torch.zeros(2, 1))

    def losses(self) -> Tensor:
        return CONFLICT.float() @ self.shared + torch.tensor([3.0, 5.0]) * self.own[:, 0]


def test_the_step_follows_the_combination_and_clips_the_whole() -> None:
    pair = Pair()
    together = OptimizerConfig(own_gradients=OwnGradients.averaged)
    paper = GradientConfig(scale=AggregateScale.paper)
    step = LossStep(pair, 0.1, 1.0, optimizer=together, aggregator="pcgrad", gradient=paper, num_tasks=2)
    norm = step(pair.losses())
    # PCGrad's (1/4, 3/4), and of the tasks' own 3/2 and 5/2 as under the mean
    whole = math.sqrt(0.25**2 + 0.75**2 + 1.5**2 + 2.5**2)
    assert norm.item() == pytest.approx(whole)
    assert pair.shared.grad is not None
    assert pair.own.grad is not None
    torch.testing.assert_close(pair.shared.grad, torch.tensor([0.25, 0.75]) / whole)
    torch.testing.assert_close(pair.own.grad, torch.tensor([[1.5], [2.5]]) / whole)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("method", [name for name in registered("gradient") if name != MEAN])
def test_combiners_never_touch_adapters(method: str, layer_norm: bool) -> None:
    gradients = []
    for chosen in (MEAN, method):
        torch.manual_seed(0)
        network = VarShareLoRAConfig(hidden=[7, 6], layer_norm=layer_norm).build(5, 3, 4, Posterior())
        temperature = torch.tensor([-4.0, 0.0, 2.0, 1.0])
        step = LossStep(network, 0.0, 0.0, aggregator=chosen, num_tasks=4, log_temperature=temperature)
        x, target = torch.randn(6, 5).expand(4, 6, 5), torch.tensor([1.0, -1.0, 2.0, -3.0])  # they conflict
        step((network(x, torch.arange(4)) - target.view(4, 1, 1)).square().mean((1, 2)))
        gradients.append([(role.own, role.parameter.grad) for role in step.roles])
    changed = False
    for (own, mean), (_, combined) in zip(*gradients, strict=True):
        assert mean is not None
        assert combined is not None
        if own:
            exact = {"rtol": 1e-5, "atol": 1e-8} if method == TEMPERATURE else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(combined, mean, **exact)
        else:
            changed |= not torch.allclose(combined, mean)
    assert changed or method == "gradnorm"  # whose first weights are 1


def test_softmax_temperature_by_hand() -> None:
    pair = Pair()
    temperature = torch.tensor([0.0, math.log(3.0)])  # weights 3/4 and 1/4
    step = LossStep(pair, 0.1, 0.0, aggregator=TEMPERATURE, log_temperature=temperature)
    step(pair.losses())
    assert pair.shared.grad is not None
    assert pair.own.grad is not None
    torch.testing.assert_close(pair.shared.grad, torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(pair.own.grad, torch.tensor([[3.0], [5.0]]))


@pytest.mark.parametrize("method", COMBINERS)
def test_one_task_and_nothing_shared_are_the_mean(method: str) -> None:
    network = SharedConfig(hidden=[4]).build(3, 2, 1, Posterior())
    step = LossStep(network, 0.1, 0.0, aggregator=method)
    loss = network(torch.randn(1, 5, 3), torch.arange(1)).square().mean((1, 2))
    expected = torch.autograd.grad(loss[0], list(network.parameters()), retain_graph=True)
    step(loss)
    for parameter, grad in zip(network.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("method", ["gradvac", "nashmtl", "gradnorm", "pcgrad"])
def test_what_is_remembered_survives(method: str) -> None:
    jacobians = torch.randn(6, 3, 20)
    losses = torch.rand(6, 3)

    def steps(aggregator: Any, which: range) -> list[Tensor]:
        torch.manual_seed(which.start)
        return [aggregator(jacobians[step], losses[step], None) for step in which]

    whole = build_aggregator(method, 3)
    steps(whole, range(3))
    half = build_aggregator(method, 3)
    steps(half, range(3))
    again = build_aggregator(method, 3)
    again.load_state(half.state())
    for one, other in zip(steps(whole, range(3, 6)), steps(again, range(3, 6)), strict=True):
        assert torch.equal(one, other)
    fresh = build_aggregator(method, 3)
    fresh.load_state(fresh.state())  # before the first step


def test_without_torchjd_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(UserError, match=r"gradient=cagrad needs TorchJD .*, of the extra gradient;"):
        build_aggregator("cagrad", 2)
    build_aggregator("gradnorm", 2)  # this one is ours
