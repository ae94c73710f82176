"""Toy tasks for methods with adapters: networks, the methods with their options, and learning by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from varshare_rl.adapters.adapter import AdapterInit
from varshare_rl.nn import VarShareLoRAConfig
from varshare_rl.nn.config import Posterior
from varshare_rl.nn.mlp import BroNet, TaskMLP
from varshare_rl.transfer.method import ContinualMethod, LayerFactory, NetworkSpec
from varshare_rl.transfer.methods.lora import AdapterStart, LoRAMethod, LoRAMethodConfig
from varshare_rl.transfer.methods.share import Learn, ShareMethod, ShareMethodConfig
from varshare_rl.transfer.methods.varshare import (
    PosteriorStart,
    PriorFrom,
    VarShareMethod,
    VarShareMethodConfig,
)
from varshare_rl.transfer.share.config import Merge, ShareConfig

IN, HIDDEN, OUT, RANK = 4, 10, 4, 2
IDS = torch.zeros(1, dtype=torch.int64)


class NoLikelihood:
    def complete(self, outputs: Tensor) -> Tensor:
        raise AssertionError

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
