"""Share on sequences of toy tasks: its basis, what its merges cost, and what it stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapter_toys import (
    CASES,
    HIDDEN,
    IDS,
    LORA,
    RANK,
    SHARE,
    SPEC,
    VARSHARE,
    inputs,
    learn,
    optimizer_of,
    outputs,
    steps,
    target,
    trained_agent,
)
from torch import nn

from varshare_rl.adapters.adapter import LowRank
from varshare_rl.errors import UserError
from varshare_rl.optim.optimizer import Kind, OptimizerConfig
from varshare_rl.optim.step import LossStep
from varshare_rl.transfer.low_rank import linear_layers
from varshare_rl.transfer.method import StorageCost
from varshare_rl.transfer.methods.lora import LoRAMethod
from varshare_rl.transfer.methods.share import Learn, ShareMethod
from varshare_rl.transfer.methods.varshare import VarShareMethod
from varshare_rl.transfer.pretrained import pretrained_from
from varshare_rl.transfer.share.config import BasisMethod, Merge, ShareConfig, SizeConfig
from varshare_rl.transfer.share.layer import ShareLinear


def test_share_with_all_directions_is_lora() -> None:
    full = replace(SHARE, initial_tasks=3, basis=ShareConfig(k=SizeConfig(max_error=0.0)))
    pair = [LoRAMethod(LORA, SPEC), ShareMethod(full, SPEC)]
    for method in pair:
        torch.manual_seed(5)
        for task in range(4):
            learn(method, task, 20)
    assert pair[1].stored().shared > pair[0].stored().shared  # there is a basis
    for task in range(4):
        torch.testing.assert_close(outputs(pair[1], task), outputs(pair[0], task), atol=1e-4, rtol=1e-4)


def test_share_reports_what_its_merges_cost() -> None:
    lossy = ShareConfig(k=SizeConfig(fixed=3))
    method = ShareMethod(replace(SHARE, basis=lossy), SPEC)
    learn(method, 0, 20)
    learn(method, 1, 20)
    assert method.report == []
    learnt = [method.waiting[1]]
    network = method.begin(2)
    steps(method, network, optimizer_of(network), 2, 20)
    learnt.append({path: LowRank(layer.factors_A[0], layer.factors_B[0]) for path, layer in _residuals(network)})
    method.end(network, inputs())
    assert method.share is not None
    assert len(method.report) == 3 * 2
    for row in method.report:
        own = learnt[row["task"] - 1][row["layer"]].delta().detach()
        rebuilt = method.share.rebuild(str(row["task"]))[row["layer"]].delta()
        assert row["error"] == pytest.approx(float((own - rebuilt).norm() / own.norm()), abs=1e-5)
        assert (row["k"], row["merges"], row["exact"]) == (3, 1, False)
    assert max(row["error"] for row in method.report) > 0.01
    learn(method, 3, 20)
    assert {row["merges"] for row in method.report} == {2}
    bounded = ShareMethod(replace(SHARE, merge=Merge.always), SPEC)
    for task in range(7):
        learn(bounded, task, 10)
    assert max(row["error"] for row in bounded.report) <= 0.01 + 1e-5  # after five merges


def _residuals(network: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, layer) for path, layer in network.named_modules() if hasattr(layer, "factors_A"))


def test_what_is_stored() -> None:
    base = sum(value.numel() for value in SPEC.plain().state_dict().values()) * 4
    sizes = [(layer.in_features, layer.out_features) for layer in linear_layers(SPEC.plain()).values()]
    adapter = 4 * sum(RANK * (inputs + outputs) for inputs, outputs in sizes)

    lora = LoRAMethod(LORA, SPEC)
    assert lora.stored().total == 0
    varshare, share = VarShareMethod(VARSHARE, SPEC), ShareMethod(SHARE, SPEC)
    originals = ShareMethod(replace(SHARE, basis=ShareConfig(keep_originals=True)), SPEC)
    for method in (lora, varshare, share, originals):
        for task in range(2):
            learn(method, task, 2)
        assert (method.stored().shared, method.stored().memory) == (base, 0)
    assert (lora.stored().tasks, varshare.stored().tasks, share.stored().tasks) == (adapter, 2 * adapter, adapter)
    for method in (share, originals):
        learn(method, 2, 2)
        assert method.share is not None
        parts = list(method.share.layers.values())
        basis = 4 * sum(layer.basis_B.numel() + layer.basis_A.numel() for layer in parts)  # type: ignore[union-attr]
        own = 4 * sum(layer.task_numbers(task) for layer in parts for task in range(2))
        kept = 2 * adapter if method is originals else 0
        assert method.stored() == StorageCost(base + basis, own, kept)
    learn(originals, 3, 2)
    assert originals.stored().memory == 3 * adapter  # the temporary directions' alone


def test_a_pretrained_agent_is_a_basis_at_once_and_its_adapters_are_kept() -> None:
    pretrained = pretrained_from(trained_agent(3), 3)
    adapters = sum(4 * (part.a.numel() + part.b.numel()) for own in pretrained.adapters for part in own.values())
    exact, rebuilt = (
        ShareMethod(replace(SHARE, exact_pretrained=exact), SPEC, pretrained) for exact in (True, False)
    )
    assert [row["task"] for row in exact.report[:3]] == [0, 1, 2]
    assert all(row["exact"] for row in exact.report)
    assert not any(row["exact"] for row in rebuilt.report)
    assert exact.stored().tasks == adapters
    assert exact.stored().memory == rebuilt.stored().tasks
    torch.testing.assert_close(outputs(exact, 1), outputs(rebuilt, 1), atol=0.1, rtol=0)
    later = ShareMethod(replace(SHARE, initial_tasks=4), SPEC, pretrained)
    assert list(_residuals(later.begin(3)))  # one more LoRA adapter, then the basis
    learn(later, 3, 5)
    assert not list(_residuals(later.begin(4)))
    assert later.share is not None
    assert later.share.tasks == ("0", "1", "2", "3")


def test_temporary_directions_are_a_quarter_at_most() -> None:
    for phi, expected in ((None, 2), (1, 1), (50, 2)):
        method = ShareMethod(replace(SHARE, phi=phi, basis=ShareConfig(k=SizeConfig(fixed=8))), SPEC)
        for task in range(3):
            if task and method.share is None:
                method.config.rank = 4
            learn(method, task, 5)
        layer = method.begin(3).get_submodule("layers.1")
        assert isinstance(layer, ShareLinear)
        assert layer.temporary is not None
        assert layer.temporary.directions_B.shape == (HIDDEN, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variational": True}, "method.variational=true needs method.learn=coefficients"),
        ({"basis": ShareConfig(method=BasisMethod.delta)}, "no task can be learnt; choose share or paper"),
        ({"initial_tasks": 0}, "method.initial_tasks is 0; it must be at least 1"),
        ({"phi": 0}, "phi is 0"),
        ({"basis": ShareConfig(p=1)}, "method.basis.p=1 cannot promise a max_error"),
        (
            {"learn": Learn.coefficients, "variational": True, "basis": ShareConfig(keep_originals=True)},
            "keep_originals=true are both given",
        ),
        ({"learn": Learn.coefficients, "variational": True, "p": 1}, "method.p is 1, and the prior comes from"),
    ],
)
def test_what_share_cannot_do_is_said_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ShareMethod(replace(SHARE, **options), SPEC)


@pytest.mark.parametrize("name", ["share", "share_coefficients", "share_variational", "lora", "varshare"])
def test_corrections_are_adapters_to_the_optimiser(name: str) -> None:
    """With PPO's epsilon their steps are as large for any scale of the loss, and nothing draws them to 0."""
    moves = []
    for scale in (1.0, 1e-6):
        torch.manual_seed(0)
        method = CASES[name](SPEC, pretrained_from(trained_agent(3), 3))
        network = method.begin(3).eval()
        with torch.no_grad():
            for path, parameter in network.named_parameters():
                if path.endswith(("eps_B", "mus_B", "factors_B")):
                    parameter.normal_(std=0.3)  # all gradients are more than 0
        step = LossStep(network, 0.01, 0.0, epsilon=1e-5, optimizer=OptimizerConfig(weight_decay=0.5))
        assert {role.kind for role in step.roles} <= {Kind.mu, Kind.rho}
        assert not any(role.decays for role in step.roles)
        before = [parameter.detach().clone() for parameter in step.parameters]
        step(scale * (network(inputs(), IDS) - target(3)).square().mean((1, 2)))
        moves.append([new.detach() - old for new, old in zip(step.parameters, before, strict=True)])
    assert max(float(move.abs().max()) for move in moves[0]) == pytest.approx(0.01, rel=1e-3)
    for usual, small in zip(*moves, strict=True):
        torch.testing.assert_close(small, usual, rtol=1e-2, atol=1e-5)
