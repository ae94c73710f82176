"""LoRA, Share and VarShare on sequences of toy tasks: what they learn, keep, pay for and store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varshare_rl.adapters.adapter import AdapterInit, LowRank
from varshare_rl.algorithms import ppo
from varshare_rl.algorithms.base import AgentContext, TaskSpec
from varshare_rl.algorithms.ppo import PPO, PPOConfig
from varshare_rl.errors import UserError
from varshare_rl.nn import L2SoftConfig, LoRAConfig, SharedConfig, VarShareConfig, VarShareLoRAConfig
from varshare_rl.nn.actor import Resample
from varshare_rl.nn.config import Blocks, Posterior, PriorUnits
from varshare_rl.nn.lora import ResidualLayer
from varshare_rl.nn.mlp import BroNet, TaskMLP
from varshare_rl.nn.parameters import total_kl
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.nn.varshare_lora import VarShareLoRALayer
from varshare_rl.optim.elbo import DrawConfig, Elbo, ElboConfig
from varshare_rl.run.checkpoint import load_checkpoint, save_checkpoint
from varshare_rl.transfer.low_rank import linear_layers, mean_of
from varshare_rl.transfer.method import ContinualMethod, LayerFactory, NetworkSpec, Pretrained, StorageCost
from varshare_rl.transfer.methods.lora import AdapterStart, LoRAMethod, LoRAMethodConfig
from varshare_rl.transfer.methods.share import Learn, ShareMethod, ShareMethodConfig
from varshare_rl.transfer.methods.varshare import (
    PosteriorStart,
    PriorFrom,
    VarShareMethod,
    VarShareMethodConfig,
)
from varshare_rl.transfer.pretrained import pretrained_from
from varshare_rl.transfer.share.coefficients import GaussianCoefficients
from varshare_rl.transfer.share.config import BasisMethod, Merge, ShareConfig, SizeConfig
from varshare_rl.transfer.share.layer import ShareLinear
from varshare_rl.types import Transition

IN, HIDDEN, OUT, RANK = 4, 10, 4, 2
IDS = torch.zeros(1, dtype=torch.int64)


class NoLikelihood:
    def sampled_log_prob(self, outputs: Tensor) -> Tensor:
        raise AssertionError

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        raise AssertionError


def mlp(layer: LayerFactory) -> nn.Module:
    return TaskMLP([IN, HIDDEN, HIDDEN, OUT], layer, "tanh", layer_norm=True)


def bronet(layer: LayerFactory) -> nn.Module:
    return BroNet([IN, HIDDEN, HIDDEN, OUT], layer, "tanh")


SPEC = NetworkSpec(IN, OUT, mlp, NoLikelihood())

LORA = LoRAMethodConfig(rank=RANK)
SHARE = ShareMethodConfig(rank=RANK, initial_tasks=2)
VARSHARE = VarShareMethodConfig(rank=RANK)
CASES: dict[str, Callable[..., ContinualMethod]] = {
    "lora": lambda *given: LoRAMethod(LORA, *given),
    "lora_mean": lambda *given: LoRAMethod(replace(LORA, start=AdapterStart.mean, rslora=True), *given),
    "lora_last": lambda *given: LoRAMethod(replace(LORA, layers="last", init=AdapterInit.gaussian), *given),
    "lora_dropout": lambda *given: LoRAMethod(replace(LORA, layers=["layers.0", "layers.1"], dropout=0.1), *given),
    "lora_similar": lambda *given: LoRAMethod(replace(LORA, start=AdapterStart.similar, alpha=3.0), *given),
    "lora_pissa": lambda *given: LoRAMethod(replace(LORA, init=AdapterInit.pissa), *given),
    "share": lambda *given: ShareMethod(SHARE, *given),
    "share_always": lambda *given: ShareMethod(replace(SHARE, merge=Merge.always), *given),
    "share_originals": lambda *given: ShareMethod(replace(SHARE, basis=ShareConfig(keep_originals=True)), *given),
    "share_coefficients": lambda *given: ShareMethod(replace(SHARE, learn=Learn.coefficients, p=None), *given),
    "share_variational": lambda *given: ShareMethod(
        replace(SHARE, learn=Learn.coefficients, variational=True), *given
    ),
    "varshare": lambda *given: VarShareMethod(VARSHARE, *given),
    "varshare_pooled": lambda *given: VarShareMethod(
        replace(VARSHARE, prior=PriorFrom.pooled, start=PosteriorStart.similar), *given
    ),
    "varshare_standard": lambda *given: VarShareMethod(
        replace(VARSHARE, prior=PriorFrom.standard, start=PosteriorStart.fresh), *given
    ),
}
NEVER_CHANGES = [name for name in CASES if not name.startswith("share")] + [
    "share_coefficients",
    "share_variational",
]


def inputs() -> Tensor:
    return torch.randn(1, 32, IN, generator=torch.Generator().manual_seed(7))


def target(task: int) -> Tensor:
    """The same function turned a little further by every task."""
    generator = torch.Generator().manual_seed(3)
    first, turn = (torch.randn(IN, OUT, generator=generator) for _ in range(2))
    return torch.sin(inputs() @ (first + 0.4 * task * turn))


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=2e-2)


def steps(
    method: ContinualMethod, network: nn.Module, optimizer: torch.optim.Optimizer, task: int, count: int
) -> float:
    for _ in range(count):
        loss = (network(inputs(), IDS) - target(task)).square().mean() + method.penalty(network, 10_000)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return error_of(network, task)


@torch.no_grad()
def error_of(network: nn.Module, task: int) -> float:
    mode = network.training
    error = float((network.eval()(inputs(), IDS) - target(task)).square().mean())
    network.train(mode)
    return error


def learn(method: ContinualMethod, task: int, count: int = 60) -> tuple[float, float]:
    """Errors before and after."""
    network = method.begin(task, similar=max(0, task - 1) if task else None)
    before = error_of(network, task)
    after = steps(method, network, optimizer_of(network), task, count)
    method.end(network, inputs())
    return before, after


@torch.no_grad()
def outputs(method: ContinualMethod, task: int) -> Tensor:
    policy = method.policy(task)
    assert not policy.training
    assert not any(p.requires_grad for p in policy.parameters())
    found: Tensor = policy(inputs(), IDS)
    return found


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def trained_agent(tasks: int = 3, network: Any = None, seed: int = 0) -> nn.Module:
    """A multi-task network whose corrections have become something."""
    torch.manual_seed(seed)
    options = network or VarShareLoRAConfig(rank=RANK)
    options = replace(options, hidden=[HIDDEN, HIDDEN], layer_norm=True)
    made: nn.Module = options.build(IN, OUT, tasks, Posterior())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "mus" in name or "factors" in name:
                parameter.normal_(std=0.4)
            if "rhos" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            if "norms" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


# learning and keeping


@pytest.mark.parametrize("name", CASES)
def test_learns_every_task_and_keeps_the_old_ones(name: str) -> None:
    method = CASES[name](SPEC)
    last: list[Tensor] = []
    for task in range(5):
        before, after = learn(method, task, 100)
        assert after < 0.6 * before or after < 0.02, (task, before, after)
        now = [outputs(method, old) for old in range(task + 1)]
        for old, (mine, kept) in enumerate(zip(now, last, strict=False)):
            if name in NEVER_CHANGES and (not name.startswith("share") or task > 2 or old == 0):
                assert torch.equal(mine, kept)
            else:
                torch.testing.assert_close(mine, kept, atol=0.05, rtol=0)
        last = now
    assert method.tasks == 5


@pytest.mark.parametrize("name", CASES)
def test_the_base_is_never_trained_again(name: str) -> None:
    method = CASES[name](SPEC)
    learn(method, 0, 5)
    before = outputs(method, 0)
    for task in range(1, 4):
        network = method.begin(task, 0)
        trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        assert trained
        assert not any("theta" in key or "bias" in key or "norms" in key for key in trained)
        steps(method, network, optimizer_of(network), task, 3)
        method.end(network, inputs())
        assert torch.equal(outputs(method, 0), before)


@pytest.mark.parametrize("name", CASES)
def test_resumes_between_tasks_and_within_one(name: str, tmp_path: Path) -> None:
    """N + N updates with everything put back in between, by way of a file, are 2N updates."""
    for finished in range(4):
        torch.manual_seed(finished)
        whole, method = CASES[name](SPEC), CASES[name](SPEC)
        for task in range(finished):
            learn(whole, task, 5)
        path = save_checkpoint(tmp_path / f"{finished}", "last", 1, whole.state())
        network = whole.begin(finished, max(0, finished - 1))
        steps(whole, network, optimizer_of(network), finished, 5)
        halfway = {key: value.clone() for key, value in network.state_dict().items()}
        random = torch.get_rng_state()
        steps(whole, network, optimizer_of(network), finished, 5)
        whole.end(network, inputs())

        method.load_state(load_checkpoint(path))
        again = method.begin(finished, max(0, finished - 1))
        again.load_state_dict(halfway)
        torch.set_rng_state(random)
        steps(method, again, optimizer_of(again), finished, 5)
        method.end(again, inputs())
        assert method.tasks == whole.tasks == finished + 1
        for task in range(finished + 1):
            assert torch.equal(outputs(whole, task), outputs(method, task))
        assert method.stored() == whole.stored()


def test_a_policy_leaves_the_random_state_alone_and_knows_its_tasks() -> None:
    for make in CASES.values():
        method = make(SPEC)
        for task in range(3):
            learn(method, task, 2)
        random = torch.get_rng_state()
        method.policy(1)
        assert torch.equal(torch.get_rng_state(), random)
        for unknown in (-1, 3):
            with pytest.raises(IndexError, match=f"unknown task id {unknown}: 3 tasks"):
                method.policy(unknown)


# LoRA


def test_a_fresh_adapter_is_the_base() -> None:
    method = LoRAMethod(replace(LORA, alpha=6.0, rslora=True), SPEC)
    learn(method, 0, 5)
    network = method.begin(1)
    assert torch.equal(network.eval()(inputs(), IDS), outputs(method, 0))
    assert network.get_submodule("layers.0").scale == pytest.approx(6.0 / RANK**0.5)


def test_adapters_of_the_chosen_layers_with_dropout() -> None:
    for layers, paths in (("last", ["layers.2"]), (["layers.0", "layers.2"], ["layers.0", "layers.2"])):
        method = LoRAMethod(replace(LORA, layers=layers, dropout=0.25, init=AdapterInit.gaussian), SPEC)
        method.end(method.begin(0), torch.randn(1, 3, IN))
        network = method.begin(1)
        made = {path: layer for path, layer in network.named_modules() if isinstance(layer, ResidualLayer)}
        assert list(made) == paths
        assert all(layer.dropout == 0.25 for layer in made.values())
        trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        assert trained == [f"{path}.factors_{part}" for path in paths for part in "AB"]
        method.end(network, torch.randn(1, 3, IN))
        assert list(method.adapter(1)) == paths
    method = LoRAMethod(replace(LORA, layers=["head"]), SPEC)
    method.end(method.begin(0), torch.randn(1, 3, IN))
    with pytest.raises(UserError, match=r"no 'head' in this network; it has layers\.0, layers\.1, layers\.2"):
        method.begin(1)


def test_the_mean_adapter_is_the_best_of_its_rank() -> None:
    """Against the dense sum and its singular values; the empty adapter counts as a correction of nothing."""
    parts = [LowRank(torch.randn(r, IN), torch.randn(OUT, r), s) for r, s in ((2, 1.0), (3, 0.5), (1, 2.0))]
    fresh = LowRank(torch.randn(RANK, IN), torch.zeros(OUT, RANK), 0.7)
    mean = mean_of([{}, *({"layer": part} for part in parts)], {"layer": fresh})["layer"]
    dense = torch.stack([part.delta() for part in parts]).sum(0) / 4
    u, s, vh = torch.linalg.svd(dense)
    torch.testing.assert_close(mean.delta(), u[:, :RANK] * s[:RANK] @ vh[:RANK], atol=1e-5, rtol=0)
    assert mean.scale == 0.7
    torch.testing.assert_close(mean.b.norm(dim=0), mean.a.norm(dim=1))  # evenly split


def test_a_mean_of_lower_rank_is_filled_up_with_what_can_learn() -> None:
    one = LowRank(torch.randn(1, IN), torch.randn(OUT, 1))
    fresh = LowRank(torch.randn(3, IN), torch.zeros(OUT, 3))
    mean = mean_of([{"layer": one}], {"layer": fresh})["layer"]
    torch.testing.assert_close(mean.delta(), one.delta())
    assert torch.equal(mean.a[1:], fresh.a[1:])
    nothing = {"layer": LowRank(torch.zeros(1, IN), torch.zeros(OUT, 1))}
    assert torch.equal(mean_of([nothing], {"layer": fresh})["layer"].a, fresh.a)
    assert mean_of([{}], {"layer": fresh})["layer"] is fresh
    assert mean_of([], {"layer": fresh})["layer"] is fresh


def test_starts_of_adapters() -> None:
    for start, expected in ((AdapterStart.fresh, 0), (AdapterStart.similar, 1)):
        method = LoRAMethod(replace(LORA, start=start), SPEC)
        for task in range(3):
            learn(method, task, 20)
        assert torch.equal(method.begin(3, similar=1).eval()(inputs(), IDS), outputs(method, expected))
        assert torch.equal(method.begin(3).eval()(inputs(), IDS), outputs(method, 0))


@pytest.mark.parametrize("init", [AdapterInit.pissa, AdapterInit.olora])
def test_adapters_that_start_from_the_base_weight(init: AdapterInit) -> None:
    """The network is the base at the start; the principal part learns, and what is kept is the difference."""
    method = LoRAMethod(replace(LORA, rank=6, alpha=3.0, init=init), SPEC)  # the base's ends allow a rank of 4
    learn(method, 0, 5)
    network = method.begin(1)
    torch.testing.assert_close(network.eval()(inputs(), IDS), outputs(method, 0))
    weights = {path: layer.theta for path, layer in method.base.layers().items()}
    for path, layer in network.named_modules():
        if isinstance(layer, ResidualLayer):
            part = layer.correction(0)
            assert part is not None
            assert part.rank == min(6, *weights[path].shape)
            if init is AdapterInit.pissa:
                u, s, vh = torch.linalg.svd(weights[path])
                expected = u[:, : part.rank] * s[: part.rank] @ vh[: part.rank]
            else:
                q, r = torch.linalg.qr(weights[path])
                expected = q[:, : part.rank] @ r[: part.rank]
            torch.testing.assert_close(part.delta() / (0.5 if init is AdapterInit.olora else 1.0), expected)
    before = error_of(network, 1)
    assert steps(method, network, optimizer_of(network), 1, 60) < 0.7 * before
    trained = network.eval()(inputs(), IDS)
    method.end(network, inputs())
    torch.testing.assert_close(outputs(method, 1), trained, atol=1e-5, rtol=1e-5)
    assert method.adapter(1)["layers.1"].rank == 12
    with pytest.raises(UserError, match=r"method\.init=olora starts from the base, method\.start=mean"):
        replace(LORA, init=AdapterInit.olora, start=AdapterStart.mean).check("method.")


# pretrained agents


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [VarShareLoRAConfig, LoRAConfig, L2SoftConfig])
@torch.no_grad()
def test_tasks_of_a_pretrained_agent_stay_bit_for_bit(name: str, kind: Any) -> None:
    agent = trained_agent(3, kind(rank=RANK, alpha=3.0)).eval()
    pretrained = pretrained_from(agent, 3)
    assert bool(pretrained.sigmas) == (kind is VarShareLoRAConfig)
    method = CASES[name](SPEC, pretrained)
    expected = [agent(inputs(), torch.tensor([task])) for task in range(3)]
    assert method.tasks == method.old_tasks == 3
    for new in range(3, 6):
        for task in range(3):
            assert torch.equal(outputs(method, task), expected[task])
        with torch.enable_grad():
            learn(method, new, 5)
    again = CASES[name](SPEC, pretrained)
    again.load_state(method.state())
    for task in range(6):
        assert torch.equal(outputs(again, task), outputs(method, task))
    assert again.stored() == method.stored()
    assert "theta" not in str(method.state()["base"])  # the pretrained agent has it


@torch.no_grad()
def test_a_pretrained_agent_of_residual_blocks() -> None:
    options = VarShareLoRAConfig(rank=RANK, hidden=[HIDDEN, HIDDEN], blocks=Blocks.bronet)
    agent = options.build(IN, OUT, 2, Posterior()).eval()
    for parameter in agent.parameters():
        parameter.normal_(std=0.3)
    method = LoRAMethod(LORA, replace(SPEC, stack=bronet), pretrained_from(agent, 2))
    for task in range(2):
        assert torch.equal(outputs(method, task), agent(inputs(), torch.tensor([task])))


def test_a_pretrained_agent_without_corrections_is_a_frozen_base() -> None:
    plain = SPEC.plain()
    for make in CASES.values():
        method = make(SPEC, Pretrained(plain.state_dict(), ({}, {})))
        assert method.old_tasks == 2
        assert torch.equal(outputs(method, 1), plain(inputs(), IDS))
        assert not any("theta" in key for key, p in method.begin(2, 0).named_parameters() if p.requires_grad)


def test_networks_that_a_sequence_cannot_go_on_from() -> None:
    options: list[Any] = [VarShareConfig(), SharedConfig(), L2SoftConfig(rank=None)]
    for option in options:
        network = option.build(IN, OUT, 3, Posterior())
        with pytest.raises(UserError, match="networks that a sequence can go on from are varshare_lora, lora"):
            pretrained_from(network, 3)
    with pytest.raises(UserError, match="for 3 tasks, not 4"):
        pretrained_from(trained_agent(3), 4)
    with pytest.raises(UserError, match="a Linear is not one shared network"):
        pretrained_from(nn.Linear(3, 3), 1)


def test_a_pretrained_agent_of_other_sizes_is_refused() -> None:
    base = SPEC.plain().state_dict()
    wrong = {"layers.0": LowRank(torch.zeros(1, IN + 1), torch.zeros(HIDDEN, 1))}
    with pytest.raises(UserError, match=r"task 1 has a correction of 10 x 5 at layers.0.*network has 10 x 4"):
        LoRAMethod(LORA, SPEC, Pretrained(base, ({}, wrong)))


# Share


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


# VarShare: priors and what is paid


def posteriors_of(pretrained: Pretrained, task: int, path: str) -> tuple[LowRank, tuple[Tensor, Tensor]]:
    return pretrained.adapters[task][path], pretrained.sigmas[task][path]


def expected_kl(network: nn.Module, prior: Callable[[str], list[tuple[Tensor, Tensor]]]) -> Tensor:
    """By torch.distributions."""
    total = torch.zeros(1)
    for path, layer in network.named_modules():
        if isinstance(layer, VarShareLoRALayer):
            for (mu, rho), (mean, std) in zip(layer.posteriors(), prior(path), strict=True):
                q = torch.distributions.Normal(mu, F.softplus(rho))
                p = torch.distributions.Normal(mean.expand_as(mu), std.expand_as(mu))
                total = total + torch.distributions.kl_divergence(q, p).sum()
    return total


def disturb(network: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.2 if "rho" in name else 0.1))


def test_the_divergence_is_paid_once_and_from_the_posterior_before() -> None:
    pretrained = pretrained_from(trained_agent(3), 3)
    method = VarShareMethod(replace(VARSHARE, kl_weight=0.3), SPEC, pretrained)
    network = method.begin(3)
    start = method.penalty(network, 1)
    assert isinstance(start, Tensor)
    assert float(start.detach()) == pytest.approx(0.0, abs=1e-3)  # it starts at the prior
    disturb(network)

    def prior(path: str) -> list[tuple[Tensor, Tensor]]:
        own, (std_a, std_b) = posteriors_of(pretrained, 2, path)
        return [(own.a, std_a), (own.b, std_b)]

    expected = expected_kl(network, prior) * 0.3 / 500
    found = method.penalty(network, 500)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), trained), torch.autograd.grad(expected.sum(), trained), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    elbo = Elbo(ElboConfig(kl_weight=1.0), 1)
    assert elbo.penalty(network, 500) == 0.0  # here it would be a second time
    assert elbo.penalty(trained_agent(1), 500) > 0.0
    assert method.penalty(SPEC.plain(), 500) == torch.zeros(1)
    assert VarShareMethod(replace(VARSHARE, kl_weight=0.0), SPEC, pretrained).penalty(network, 5) == 0.0


def test_a_given_prior_is_in_no_state_dict_and_follows_the_layer() -> None:
    plain, given = (VarShareLoRALayer(IN, OUT, 2, RANK) for _ in range(2))
    given.give_prior([(torch.randn(RANK, IN), torch.ones(RANK, IN)), (torch.randn(OUT, RANK), torch.ones(1))])
    assert plain.state_dict().keys() == given.state_dict().keys()
    given.load_state_dict(plain.state_dict())
    assert (given.kl() > plain.kl()).all()
    assert given.double().kl().dtype == torch.float64


def test_the_standard_prior_is_that_of_the_layer() -> None:
    absolute = replace(VARSHARE, prior_scale=0.4, prior_units=PriorUnits.absolute)
    options = replace(absolute, prior=PriorFrom.standard, kl_weight=1.0)
    first = VarShareMethod(replace(options, prior=PriorFrom.previous), SPEC, Pretrained(SPEC.plain().state_dict()))
    for method in (VarShareMethod(options, SPEC, pretrained_from(trained_agent(3), 3)), first):
        network = method.begin(method.tasks)
        disturb(network)
        expected = expected_kl(network, lambda path: [(torch.zeros(()), torch.tensor(0.4))] * 2)
        torch.testing.assert_close(method.penalty(network, 1), expected, rtol=1e-4, atol=1e-3)


def test_the_standard_prior_in_units_of_theta_is_small_beside_it() -> None:
    """Residuals drawn from it have ``prior_scale`` times the standard deviation of a fresh layer's weights."""
    options = replace(VARSHARE, prior=PriorFrom.standard, prior_scale=0.1)
    network = VarShareMethod(options, SPEC, Pretrained(SPEC.plain().state_dict())).begin(1)
    for _, layer in stochastic_layers(network):
        entries = layer.scale * layer.prior_scale.square() * layer.rank**0.5
        torch.testing.assert_close(entries, torch.tensor([0.1 / (3 * layer.in_features) ** 0.5]), rtol=1e-5, atol=0)


def test_a_pooled_prior_matches_moments_over_all_posteriors() -> None:
    """Tasks whose factors agree up to small changes, so that turning them to agree does little; then one turned."""
    base, generator = SPEC.plain().state_dict(), torch.Generator().manual_seed(1)
    first = {
        path: LowRank(torch.randn(1, layer.in_features), torch.randn(layer.out_features, 1))
        for path, layer in linear_layers(SPEC.plain()).items()
    }

    def noisy(value: Tensor, amount: float) -> Tensor:
        return value + amount * torch.randn(value.shape, generator=generator)

    adapters = tuple(
        {path: LowRank(noisy(own.a, 0.05), noisy(own.b, 0.05)) for path, own in first.items()} for _ in range(3)
    )
    sigmas = tuple(
        {path: (noisy(own.a, 1.0).abs() + 0.1, noisy(own.b, 1.0).abs() + 0.1) for path, own in first.items()}
        for _ in range(3)
    )
    flipped = {path: LowRank(-own.a, -own.b) for path, own in adapters[1].items()}  # the same correction
    for given in (adapters, (adapters[0], flipped, adapters[2])):
        options = replace(VARSHARE, rank=1, prior=PriorFrom.pooled)
        method = VarShareMethod(options, SPEC, Pretrained(base, given, sigmas))
        network = method.begin(3)
        layer = network.get_submodule("layers.1")
        assert isinstance(layer, VarShareLoRALayer)
        for index, name in enumerate(("a", "b")):
            mus = torch.stack([getattr(own["layers.1"], name) for own in adapters])
            stds = torch.stack([own["layers.1"][index] for own in sigmas])
            mean = mus.mean(0)
            sigma = (stds.square() + (mus - mean).square()).mean(0).sqrt()
            mu, rho = layer.posteriors()[index]
            factor = "AB"[index]
            found = layer.get_buffer(f"prior_mean_of_mus_{factor}"), layer.get_buffer(f"prior_std_of_mus_{factor}")
            sign = torch.sign((found[0] * mean).sum())
            torch.testing.assert_close(found[0] * sign, mean)
            torch.testing.assert_close(found[1], sigma)
            torch.testing.assert_close(mu[0].detach(), found[0])  # where it starts
            torch.testing.assert_close(F.softplus(rho[0]).detach(), stds.square().mean(0).sqrt())


def test_factors_of_another_scale_are_the_same_prior() -> None:
    agent = trained_agent(2, VarShareLoRAConfig(rank=RANK, alpha=6.0))
    pretrained = pretrained_from(agent, 2)
    method = VarShareMethod(replace(VARSHARE, alpha=1.0), SPEC, pretrained)
    network = method.begin(2).eval()
    std_b = pretrained.sigmas[1]["layers.1"][1] * 6.0  # scales of 3 and of 1/2
    torch.testing.assert_close(network.get_buffer("layers.1.prior_std_of_mus_B"), std_b)
    assert float(total_kl(network, 1).detach()) == pytest.approx(0.0, abs=1e-3)
    torch.testing.assert_close(network(inputs(), IDS), agent.eval()(inputs(), IDS + 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_starts_of_posteriors() -> None:
    pretrained = pretrained_from(trained_agent(3), 3)

    def started(start: PosteriorStart, similar: int | None = None, pretrained: Pretrained = pretrained) -> Tensor:
        method = VarShareMethod(replace(VARSHARE, start=start), SPEC, pretrained)
        found: Tensor = method.begin(3, similar).eval()(inputs(), IDS)
        return found

    method = VarShareMethod(VARSHARE, SPEC, pretrained)
    plain = method.base.network()(inputs(), IDS)
    assert torch.equal(started(PosteriorStart.fresh), plain)
    assert torch.equal(started(PosteriorStart.similar), plain)
    assert torch.equal(started(PosteriorStart.similar, 1), outputs(method, 1))
    assert torch.equal(started(PosteriorStart.prior, 1), outputs(method, 2))
    layer = VarShareMethod(replace(VARSHARE, start=PosteriorStart.similar), SPEC, pretrained).begin(3, 0)
    stds = F.softplus(layer.get_parameter("layers.0.rhos_B"))[0]
    torch.testing.assert_close(stds, pretrained.sigmas[0]["layers.0"][1])
    points = Pretrained(pretrained.base, pretrained.adapters)  # of an agent without posteriors
    assert torch.equal(started(PosteriorStart.prior, pretrained=points), outputs(method, 2))


def test_another_rank_is_refused_where_factors_are_compared() -> None:
    pretrained = pretrained_from(trained_agent(2), 2)
    with pytest.raises(UserError, match=r"method.rank is 3, and .* rank 2; give method.rank=2"):
        VarShareMethod(replace(VARSHARE, rank=3), SPEC, pretrained)
    VarShareMethod(replace(VARSHARE, rank=3, prior=PriorFrom.standard), SPEC, pretrained).begin(2)


def test_the_mean_of_the_posterior_is_what_acts() -> None:
    method = VarShareMethod(VARSHARE, SPEC, pretrained_from(trained_agent(2), 2))
    network = method.begin(2)
    with torch.no_grad():
        assert not torch.equal(network(inputs(), IDS), network(inputs(), IDS))  # it draws in training
        method.end(network, inputs())
        assert torch.equal(network.eval()(inputs(), IDS), outputs(method, 2))


def test_variational_coefficients_pay_once() -> None:
    options = replace(SHARE, learn=Learn.coefficients, variational=True, kl_weight=0.2)
    method = ShareMethod(options, SPEC, pretrained_from(trained_agent(3), 3))
    network = method.begin(3)
    layers = [layer for layer in network.modules() if isinstance(layer, GaussianCoefficients)]
    assert len(layers) == 3
    assert method.penalty(network, 40) == total_kl(network, 1) * (0.2 / 40)
    assert float(total_kl(network, 1).detach()) == float(sum(layer.kl() for layer in layers).detach())  # type: ignore[union-attr]
    assert Elbo(ElboConfig(kl_weight=1.0), 1).penalty(network, 40) == 0.0
    learn(method, 3, 5)
    assert method.share is not None
    own = method.share.layers["layers.0"].coefficients[3]  # type: ignore[union-attr]
    assert own.std_B is not None  # type: ignore[union-attr]


# acting under draws


@dataclass
class Watched:
    ratios: list[Tensor]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen = Watched([])
    plain = ppo.ppo_policy_loss

    def loss(log_prob: Tensor, old_log_prob: Tensor, *rest: Any) -> Any:
        seen.ratios.append((log_prob - old_log_prob).detach().exp())
        return plain(log_prob, old_log_prob, *rest)

    monkeypatch.setattr(ppo, "ppo_policy_loss", loss)
    return seen


@pytest.mark.parametrize("name", ["varshare", "share_variational", "share", "lora"])
@pytest.mark.parametrize("acting", list(Resample))
def test_ppo_learns_with_a_ratio_of_one_before_its_first_step(
    name: str, acting: Resample, watched: Watched
) -> None:
    method = CASES[name](SPEC, pretrained_from(trained_agent(3), 3))
    mask = torch.ones(1, OUT // 2, dtype=torch.bool)
    problem = TaskSpec(1, 4, IN, OUT // 2, False, mask, torch.device("cpu"), horizon=40)
    network = method.begin(3)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "rhos" in key:
                parameter.fill_(-1.0)  # noise that matters
            if "mus_B" in key or "eps_B" in key:
                parameter.normal_(std=0.3)
    elbo = Elbo(ElboConfig(draw=DrawConfig(acting=acting)), 1)
    made: list[Callable[[], nn.Module]] = [lambda: network]
    learner = PPO(
        PPOConfig(rollout_transitions_per_task=40, epochs=2, minibatches=1, target_kl=None),
        AgentContext(problem, lambda *sizes: made.pop()(), elbo, make_critic_network=_critic),
    )
    acts_with_draws = name in ("varshare", "share_variational")
    assert ("none" in learner.weight_draws()) != acts_with_draws
    for _ in range(2):
        while not learner.ready():
            obs = torch.randn(1, 4, IN)
            action = learner.act(obs)
            done = torch.rand(1, 4) < 0.2
            never = torch.zeros_like(done)
            learner.observe(Transition(obs, action, torch.randn(1, 4), done, never, torch.randn(1, 4, IN)))
        watched.ratios.clear()
        learner.update()
        first, second = watched.ratios
        assert float((first - 1).abs().max()) < 2e-5
        assert float((second - 1).abs().max()) > 1e-4
    if acts_with_draws and acting is not Resample.mean:
        assert learner.weight_sampler.layers
    assert not any(getattr(layer, "noise", None) for layer in network.modules())
    method.end(network, torch.randn(1, 5, IN))
    method.policy(3)


def _critic(in_features: int, out_features: int) -> nn.Module:
    return TaskMLP([in_features, 8, out_features], lambda a, b: VarShareLoRALayer(a, b, 1, 2), "tanh")
