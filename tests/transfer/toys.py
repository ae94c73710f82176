"""Small sequences of regression tasks, and the likelihood and networks that the methods' tests learn them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from varshare_rl.adapters.adapter import LowRank
from varshare_rl.nn.config import Blocks
from varshare_rl.nn.shared import SharedConfig, SharedLayer
from varshare_rl.transfer.method import ContinualMethod, NetworkSpec, Pretrained

IN, OUT, SAMPLES = 3, 2, 64
TASK_IDS = torch.zeros(1, dtype=torch.int64)


class UnitGaussian:
    """``N(outputs, 1)``; draws are one standard deviation away, which is their second moment without its noise."""

    def complete(self, outputs: Tensor) -> Tensor:
        return outputs

    def sampled_log_prob(self, outputs: Tensor) -> Tensor:
        signs = torch.randint(0, 2, outputs.shape).to(outputs) * 2 - 1
        return -0.5 * (outputs.detach() + signs - outputs).square().sum(-1)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        return 0.5 * (old - new).square().sum(-1)


def mlp_spec(*hidden: int, layer_norm: bool = False, outputs: int = OUT) -> NetworkSpec:
    options = SharedConfig(hidden=list(hidden), layer_norm=layer_norm)
    return NetworkSpec(IN, outputs, lambda layer: options.stack(IN, outputs, layer), UnitGaussian())


def bronet_spec(*hidden: int) -> NetworkSpec:
    options = SharedConfig(hidden=list(hidden), activation="relu", blocks=Blocks.bronet)
    return NetworkSpec(IN, OUT, lambda layer: options.stack(IN, OUT, layer), UnitGaussian())


SPECS: dict[str, Callable[[], NetworkSpec]] = {
    "mlp": lambda: mlp_spec(16, 16),
    "layer_norm": lambda: mlp_spec(16, 16, layer_norm=True),
    "bronet": lambda: bronet_spec(16, 16),
}


def make_pretrained(spec: NetworkSpec, tasks: int = 2, rank: int = 2) -> Pretrained:
    """A base with random adapters on all layers but the last task's, which corrects the first layer alone."""
    base = spec.plain()
    layers = [(path, layer) for path, layer in base.named_modules() if isinstance(layer, SharedLayer)]
    adapters, sigmas = [], []
    for task in range(tasks):
        chosen = layers if task < tasks - 1 else layers[:1]
        sizes = {path: (layer.in_features, layer.out_features) for path, layer in chosen}
        adapter = {
            path: LowRank(torch.randn(rank, a), torch.randn(b, rank) * 0.3, 0.5) for path, (a, b) in sizes.items()
        }
        adapters.append(adapter)
        sigmas.append({path: (torch.rand(rank, a), torch.rand(b, rank)) for path, (a, b) in sizes.items()})
    state = {name: value.detach().clone() for name, value in base.state_dict().items()}
    return Pretrained(state, tuple(adapters), tuple(sigmas))


def task_data(task: int) -> tuple[Tensor, Tensor]:
    """Inputs ``[1, N, F]`` in a region of the task's own, and targets ``[1, N, G]``."""
    generator = torch.Generator().manual_seed(100 + task)
    x = torch.randn(1, SAMPLES, IN, generator=generator)
    x[..., 0] += 3.0 * (-1) ** task
    weight = torch.randn(IN, OUT, generator=generator)
    return x, torch.tanh(x @ weight)


def error(network: nn.Module, task: int) -> float:
    """Mean squared error on a task."""
    x, y = task_data(task)
    with torch.no_grad():
        return float((network(x, TASK_IDS) - y).square().mean())


class Learning:
    """Training on one task, step by step, from :meth:`ContinualMethod.begin` to :meth:`ContinualMethod.end`."""

    def __init__(self, method: ContinualMethod, task: int, steps: int, data: int | None = None) -> None:
        self.method, self.task, self.steps, self.step = method, task, steps, 0
        self.network = method.begin(task)
        self.x, self.y = task_data(task if data is None else data)
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.adam = torch.optim.Adam(trained, lr=0.01) if trained else None

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            if self.adam is not None:
                loss = (self.network(self.x, TASK_IDS) - self.y).square().mean((1, 2))
                loss = loss + self.method.penalty(self.network, SAMPLES)
                assert loss.shape == (1,)
                self.adam.zero_grad()
                loss.sum().backward()
                self.adam.step()
            self.method.advance(self.network, self.step / self.steps)

    def finish(self) -> None:
        self.run(self.steps - self.step)
        self.method.end(self.network, self.x)

    def state(self) -> dict[str, Any]:
        adam = None if self.adam is None else self.adam.state_dict()
        return {"network": self.network.state_dict(), "adam": adam, "step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.adam is not None:
            self.adam.load_state_dict(state["adam"])
        self.step = state["step"]


def learn(method: ContinualMethod, tasks: int, steps: int = 40) -> None:
    """Learn the next ``tasks`` tasks."""
    for task in range(method.tasks, method.tasks + tasks):
        Learning(method, task, steps).finish()


def weights(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's state dict."""
    return {name: value.clone() for name, value in network.state_dict().items()}


def outputs(network: nn.Module) -> Tensor:
    """What a network gives on some inputs."""
    x = torch.randn(1, 7, IN, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        result: Tensor = network(x, TASK_IDS)
    return result
