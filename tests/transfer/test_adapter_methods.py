"""LoRA, Share and VarShare on sequences of toy tasks: what they learn and keep, and how LoRA starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_toys import (
    CASES,
    HIDDEN,
    IDS,
    IN,
    LORA,
    NEVER_CHANGES,
    OUT,
    RANK,
    SPEC,
    bronet,
    error_of,
    inputs,
    learn,
    optimizer_of,
    outputs,
    steps,
    trained_agent,
)
from torch import Tensor, nn

from varshare_rl.adapters.adapter import AdapterInit, LowRank
from varshare_rl.errors import UserError
from varshare_rl.nn import L2SoftConfig, LoRAConfig, SharedConfig, VarShareConfig, VarShareLoRAConfig
from varshare_rl.nn.config import Blocks, Posterior
from varshare_rl.nn.lora import ResidualLayer
from varshare_rl.run.checkpoint import load_checkpoint, save_checkpoint
from varshare_rl.transfer.low_rank import mean_of
from varshare_rl.transfer.method import Pretrained
from varshare_rl.transfer.methods.lora import AdapterStart, LoRAMethod
from varshare_rl.transfer.pretrained import pretrained_from


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
    random = torch.random.get_rng_state()
    with pytest.raises(UserError, match=r"method\.layers has 'head'.*some of layers\.0, layers\.1, layers\.2"):
        LoRAMethod(replace(LORA, layers=["head"]), SPEC)
    assert torch.equal(torch.random.get_rng_state(), random)


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
