from __future__ import annotations

import pytest
import torch
from naive import scramble
from torch import Tensor, nn

from varshare_rl.nn import (
    IndependentConfig,
    L2SoftConfig,
    LoRAConfig,
    Posterior,
    SharedConfig,
    TaskEmbeddingConfig,
    VarShareConfig,
    VarShareLoRAConfig,
)
from varshare_rl.nn.config import Blocks, NetworkConfig
from varshare_rl.nn.mlp import BroNet
from varshare_rl.nn.parameters import ParameterCount, count_parameters, total_kl

IN, OUT, TASKS, BATCH = 5, 3, 4, 6
ARCHITECTURES: dict[str, type[NetworkConfig]] = {
    "shared": SharedConfig, "independent": IndependentConfig, "varshare": VarShareConfig,
    "varshare_lora": VarShareLoRAConfig, "lora": LoRAConfig, "l2_soft": L2SoftConfig,
    "task_embedding": TaskEmbeddingConfig,
}  # fmt: skip


def build(name: str, hidden: list[int], activation: str = "relu") -> nn.Module:
    options = ARCHITECTURES[name](hidden=hidden, activation=activation, blocks=Blocks.bronet)
    return options.build(IN, OUT, TASKS, Posterior())


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


def test_shared_is_a_plain_sequential() -> None:
    network = build("shared", [7, 7, 7])
    scramble(network)

    def block() -> nn.Module:
        return Residual(
            nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 7), nn.LayerNorm(7))
        )

    plain = nn.Sequential(nn.Linear(IN + TASKS, 7), nn.LayerNorm(7), nn.ReLU(), block(), block(), nn.Linear(7, OUT))
    linears = [module for module in plain.modules() if isinstance(module, nn.Linear)]
    norms = [module for module in plain.modules() if isinstance(module, nn.LayerNorm)]
    with torch.no_grad():
        for linear, layer in zip(linears, network.layers, strict=True):  # type: ignore[call-overload]
            linear.weight.copy_(layer.theta)
            linear.bias.copy_(layer.bias)
        for norm, ours in zip(norms, network.norms, strict=True):  # type: ignore[call-overload]
            norm.load_state_dict(ours.state_dict())
    x = torch.randn(TASKS, BATCH, IN)
    one_hot = torch.eye(TASKS).unsqueeze(1).expand(TASKS, BATCH, TASKS)
    expected = plain(torch.cat([x, one_hot], -1))
    torch.testing.assert_close(network(x, torch.arange(TASKS)), expected, rtol=1e-5, atol=1e-5)
    (expected.square().sum() / 100).backward()
    (network(x, torch.arange(TASKS)).square().sum() / 100).backward()
    for linear, layer in zip(linears, network.layers, strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(layer.theta.grad, linear.weight.grad, rtol=1e-4, atol=1e-5)


# Layers 5 -> 7, 7 -> 7 four times, 7 -> 3:
# weights 35 + 4 * 49 + 21 = 252, biases 5 * 7 + 3 = 38, norms 5 * 14 = 70.
COUNTS = {
    "shared": ParameterCount(360 + 28, 360 + 28, 360 + 28, 0),  # one-hot: 4 more columns of 7
    "independent": ParameterCount(4 * 360, 360, 0, 360),
    "varshare": ParameterCount(360 + 4 * 504, 360 + 252, 360, 504),
    # rank 8: factors of 8 * (5 + 7) + 4 * 8 * (7 + 7) + 8 * (7 + 3) = 624
    "varshare_lora": ParameterCount(360 + 4 * 1248, 360 + 624, 360, 1248),
    "lora": ParameterCount(360 + 4 * 624, 360 + 624, 360, 624),
    "l2_soft": ParameterCount(360 + 4 * 624, 360 + 624, 360, 624),
    "task_embedding": ParameterCount(584 + 4 * 32, 584 + 32, 584, 32),  # 32 more columns of 7
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_by_hand(name: str) -> None:
    network = build(name, [7, 7, 7])
    assert count_parameters([network], TASKS) == COUNTS[name]


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batched_is_one_task_at_a_time_in_every_layout(name: str, activation: str) -> None:
    network = build(name, [7, 7], activation).double()
    scramble(network)
    network.eval()
    x, ids = torch.randn(TASKS, BATCH, IN, dtype=torch.float64), torch.arange(TASKS)
    together = network(x, ids)
    assert together.shape == (TASKS, BATCH, OUT)
    alone = torch.stack([network(x[task], task) for task in range(TASKS)])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)
    flat = network(x.flatten(0, 1), ids.repeat_interleave(BATCH))
    torch.testing.assert_close(together, flat.view_as(together), rtol=1e-11, atol=1e-11)
    network.train()
    network(x, ids).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    assert total_kl(network, TASKS).shape == (TASKS,)


def test_one_hidden_size_is_no_block() -> None:
    network = build("shared", [7])
    assert isinstance(network, BroNet)
    assert len(network.layers) == 2


@pytest.mark.parametrize("hidden", [[], [7, 6]])
def test_hidden_sizes_must_be_one(hidden: list[int]) -> None:
    with pytest.raises(ValueError, match="all the same"):
        build("shared", hidden)
