"""What holds for every continual-learning method: one table of methods times invariants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import IN, OUT, SPECS, TASK_IDS, Learning, error, learn, make_pretrained, mlp_spec, outputs

from varshare_rl.registry import lookup
from varshare_rl.run.checkpoint import load_checkpoint, save_checkpoint
from varshare_rl.transfer.method import ContinualMethod, ContinualMethodConfig, NetworkSpec, Pretrained
from varshare_rl.transfer.methods.copies import Copies, CopiesConfig, Start
from varshare_rl.transfer.methods.ewc import EWC, EWCConfig
from varshare_rl.transfer.methods.finetune import Finetune, FinetuneConfig
from varshare_rl.transfer.methods.frozen import Frozen, FrozenConfig
from varshare_rl.transfer.methods.packnet import PackNet, PackNetConfig
from varshare_rl.transfer.methods.pnn import PNN, PNNConfig
from varshare_rl.transfer.methods.replay import ExperienceReplay, ExperienceReplayConfig
from varshare_rl.transfer.methods.shared_private import SharedPrivate, SharedPrivateConfig


@dataclass(frozen=True)
class Case:
    """A method with small options, and what it promises."""

    method: type[ContinualMethod]
    config: ContinualMethodConfig
    keeps_old: bool = True  # later tasks leave earlier ones' policies as they are, to the bit
    learns_later: bool = True  # the second task is learnt at all
    exact_pretrained: bool = True  # a pretrained agent's task is acted by its base with its adapter, to the bit

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> Any:
        return self.method(self.config, spec, pretrained)


CASES: dict[str, Case] = {
    "finetune": Case(Finetune, FinetuneConfig(), keeps_old=False, exact_pretrained=False),
    "frozen": Case(Frozen, FrozenConfig(), learns_later=False, exact_pretrained=False),
    "copies": Case(Copies, CopiesConfig()),
    "copies_base": Case(Copies, CopiesConfig(start=Start.base)),
    "copies_scratch": Case(Copies, CopiesConfig(start=Start.scratch)),
    "shared_private": Case(SharedPrivate, SharedPrivateConfig()),
    "ewc": Case(EWC, EWCConfig(weight=100.0, fisher_samples=16), keeps_old=False, exact_pretrained=False),
    "ewc_online": Case(
        EWC, EWCConfig(weight=100.0, fisher_samples=16, online=True), keeps_old=False, exact_pretrained=False
    ),
    "replay": Case(
        ExperienceReplay,
        ExperienceReplayConfig(samples_per_task=32, batch=16),
        keeps_old=False,
        exact_pretrained=False,
    ),
    "packnet": Case(PackNet, PackNetConfig()),
    "pnn": Case(PNN, PNNConfig(lateral=4)),
}
PRETRAINED: dict[str, Callable[[NetworkSpec], Pretrained | None]] = {
    "new": lambda spec: None,
    "pretrained": make_pretrained,
    "base_only": lambda spec: make_pretrained(spec, tasks=0),
}

case_names = pytest.mark.parametrize("name", CASES)
pretrained_names = pytest.mark.parametrize("pretrained", PRETRAINED)


@case_names
@pretrained_names
@pytest.mark.parametrize("spec", SPECS)
def test_networks_are_of_one_task_and_old_policies_stay(name: str, pretrained: str, spec: str) -> None:
    case, made = CASES[name], SPECS[spec]()
    method = case.build(made, PRETRAINED[pretrained](made))
    first = method.tasks
    assert first == (2 if pretrained == "pretrained" else 0)
    learnt: dict[int, torch.Tensor] = {task: outputs(method.policy(task)) for task in range(first)}
    for task in range(first, first + 3):
        network = method.begin(task)
        assert network(torch.randn(1, 5, IN), TASK_IDS).shape == (1, 5, OUT)
        Learning(method, task, steps=4).finish()
        assert method.tasks == task + 1
        policy = method.policy(task)
        assert not policy.training
        assert not any(parameter.requires_grad for parameter in policy.parameters())
        learnt[task] = outputs(policy)
        if case.keeps_old:
            for old, before in learnt.items():
                assert torch.equal(outputs(method.policy(old)), before), f"task {old} after {task}"


@case_names
def test_policies_of_a_pretrained_agent(name: str) -> None:
    case, spec = CASES[name], mlp_spec(16, 16)
    pretrained = make_pretrained(spec)
    method = case.build(spec, pretrained)
    learn(method, 1, steps=2)
    for task, adapter in enumerate(pretrained.adapters):
        expected = spec.plain()
        state = {key: value.clone() for key, value in pretrained.base.items()}
        for path, factor in adapter.items():
            state[f"{path}.theta"] += factor.scale * (factor.b @ factor.a)
        expected.load_state_dict(state)
        got = outputs(method.policy(task))
        if case.method.task_free:
            assert torch.equal(got, outputs(method.policy(method.tasks - 1)))
        if case.exact_pretrained:
            assert torch.equal(got, outputs(expected))


@case_names
@pretrained_names
def test_learning_helps(name: str, pretrained: str) -> None:
    case, spec = CASES[name], mlp_spec(16, 16)
    method = case.build(spec, PRETRAINED[pretrained](spec))
    for place, task in enumerate((method.tasks, method.tasks + 1)):
        before = error(method.begin(task), task)
        Learning(method, task, steps=150).finish()
        after = error(method.policy(task), task)
        if case.learns_later or (place == 0 and pretrained == "new"):
            assert after < 0.5 * before
        else:
            assert after == before


@case_names
def test_a_network_that_is_finished_is_the_policy(name: str) -> None:
    method = CASES[name].build(mlp_spec(16, 16))
    for task in range(2):
        learning = Learning(method, task, steps=4)
        learning.finish()
        assert torch.equal(outputs(method.policy(task)), outputs(learning.network))


@case_names
@pytest.mark.parametrize("task", [-1, 3])
def test_unknown_tasks_are_named(name: str, task: int) -> None:
    method = CASES[name].build(mlp_spec(8))
    learn(method, 3, steps=1)
    with pytest.raises(IndexError, match=f"unknown task id {task}"):
        method.policy(task)


def on_disk(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tree as a checkpoint gives it back."""
    return load_checkpoint(save_checkpoint(folder, "last", 1, tree))


@case_names
@pretrained_names
@pytest.mark.parametrize("spec", ["mlp", "bronet"])
def test_resume_within_a_task_is_exact(name: str, pretrained: str, spec: str, tmp_path: Path) -> None:
    made = SPECS[spec]()
    given = PRETRAINED[pretrained](made)
    method = CASES[name].build(made, given)
    learn(method, 2, steps=4)
    before = method.state()  # a run writes it from within the task
    learning = Learning(method, method.tasks, steps=8)
    for point in (3, 6):  # before and after half the task
        learning.run(point - learning.step)
        tree = {"method": before, "learning": learning.state(), "rng": torch.get_rng_state()}
        saved = on_disk(tree, tmp_path / str(point))
        torch.manual_seed(point)
        again = CASES[name].build(made, given)
        again.load_state(saved["method"])
        resumed = Learning(again, again.tasks, steps=8)
        resumed.load_state(saved["learning"])
        torch.set_rng_state(saved["rng"])
        resumed.finish()
        learn(again, 1, steps=4)
        results = [outputs(again.policy(task)) for task in range(again.tasks)]
        torch.set_rng_state(saved["rng"])
        if point == 3:
            first = results
        else:
            learning.finish()
            learn(method, 1, steps=4)
            straight = [outputs(method.policy(task)) for task in range(method.tasks)]
            for one, two, three in zip(first, results, straight, strict=True):
                assert torch.equal(one, three)
                assert torch.equal(two, three)


@case_names
@pretrained_names
def test_a_state_that_was_given_out_does_not_change(name: str, pretrained: str, tmp_path: Path) -> None:
    spec = mlp_spec(8)
    method = CASES[name].build(spec, PRETRAINED[pretrained](spec))
    learn(method, 2, steps=2)
    state = method.state()
    saved = on_disk(state, tmp_path)
    learn(method, 2, steps=4)
    _assert_same(state, saved)
    again = CASES[name].build(spec, method.pretrained)
    again.load_state(state)
    _assert_same(again.state(), saved)
    assert again.tasks == method.tasks - 2


@case_names
def test_what_is_done_to_a_network_after_its_task_changes_nothing(name: str, tmp_path: Path) -> None:
    method = CASES[name].build(mlp_spec(8))
    for task in range(2):
        learning = Learning(method, task, steps=2)
        learning.finish()
        saved = on_disk(method.state(), tmp_path / str(task))
        policy = method.policy(task)
        with torch.no_grad():
            for network in (learning.network, policy):
                for tensor in network.state_dict().values():
                    tensor.copy_(torch.ones_like(tensor))
        _assert_same(method.state(), saved)


def _assert_same(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            _assert_same(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            _assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
        assert not one.requires_grad
    else:
        assert one == two


@case_names
@pretrained_names
def test_bytes_never_shrink_and_the_network_is_in_them(name: str, pretrained: str) -> None:
    spec = mlp_spec(16, 16)
    method = CASES[name].build(spec, PRETRAINED[pretrained](spec))
    network = 4 * sum(parameter.numel() for parameter in spec.plain().parameters())
    seen = []
    for _ in range(3):
        learn(method, 1, steps=2)
        stored = method.stored()
        assert stored.total == stored.shared + stored.tasks + stored.memory
        seen.append(stored)
    assert seen[0].shared + seen[0].tasks >= network
    for earlier, later in pairwise(seen):
        assert later.shared == earlier.shared
        assert later.tasks >= earlier.tasks
        assert later.memory >= earlier.memory


def forgotten(name: str) -> float:
    """What the first of two tasks loses while the second is learnt."""
    torch.manual_seed(1)
    method = CASES[name].build(mlp_spec(32, 32))
    Learning(method, 0, steps=300).finish()
    before = error(method.policy(0), 0)
    Learning(method, 1, steps=300).finish()
    assert error(method.policy(1), 1) < 0.1
    return error(method.policy(0), 0) - before


def test_finetuning_forgets_and_the_others_forget_less() -> None:
    naive = forgotten("finetune")
    assert naive > 0.1
    for name in ("ewc", "ewc_online", "replay"):
        assert forgotten(name) < 0.5 * naive


@case_names
def test_options_can_be_chosen_by_their_name(name: str) -> None:
    options = CASES[name].config
    assert type(options)().name == options.name
    assert lookup("method", options.name) is type(options)
