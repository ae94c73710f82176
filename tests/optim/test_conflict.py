from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import build, collect
from torch import nn

from varshare_rl.algorithms.ppo import PPOConfig
from varshare_rl.algorithms.sac import SACConfig
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.nn import IndependentConfig, Posterior, SharedConfig, VarShareLoRAConfig
from varshare_rl.nn.parameters import shared_parameters
from varshare_rl.optim.jacobian import gradient_gram
from varshare_rl.optim.step import LossStep

ALGORITHMS: dict[str, Callable[[], Any]] = {
    "ppo": lambda: PPOConfig(rollout_transitions_per_task=40, epochs=2, minibatches=2),
    "sac": lambda: SACConfig(start_transitions_per_task=20, batch_per_task=8, replay_capacity_per_task=100),
}


def test_gradients_by_hand() -> None:
    x, y = nn.Parameter(torch.tensor([2.0, 0.0])), nn.Parameter(torch.tensor(1.0))
    losses = torch.stack([3.0 * x[0] + y, -1.0 * x[0] + 4.0 * x[1], x[1].square()])  # (3, 0, 1) (-1, 4, 0) (0, 0)
    assert gradient_gram(losses, [x, y]).tolist() == [[10.0, -3.0, 0.0], [-3.0, 17.0, 0.0], [0.0, 0.0, 0.0]]
    assert x.grad is None
    losses.sum().backward()  # the graph is still there
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 4.0]


def test_a_step_measures_once_when_it_is_asked() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 1.0]))
    step = LossStep([parameter], 0.1, 0.0)
    losses = torch.stack([3.0 * parameter[0], 4.0 * parameter[1]])
    step(losses)
    assert step.gram is None
    step.measure_gram([parameter])
    step(torch.stack([3.0 * parameter[0], -2.0 * parameter[0] + parameter[1]]))
    assert step.gram is not None
    kept = step.gram
    assert kept.tolist() == [[9.0, -6.0], [-6.0, 5.0]]
    step(torch.stack([parameter[0], parameter[1]]))
    assert step.gram is kept
    step.measure_gram([])  # nothing is shared
    step(torch.stack([parameter[0], parameter[1]]))
    assert step.gram is None


def test_shared_parameters_are_those_of_no_task() -> None:
    build_network = VarShareLoRAConfig(hidden=[4], layer_norm=True).build
    network = build_network(3, 2, 5, Posterior())
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert [names[id(parameter)] for parameter in shared_parameters(network)] == [
        "layers.0.theta", "layers.0.bias", "layers.1.theta", "layers.1.bias", "norms.0.weight", "norms.0.bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "network", [VarShareLoRAConfig(hidden=[16]), SharedConfig(hidden=[16])], ids=["varshare_lora", "shared"]
)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_measuring_changes_no_bit_of_the_training(name: str, network: Any) -> None:
    def train(measure: bool) -> tuple[Any, torch.Tensor]:
        _, engine, learner = build(PointMassConfig(envs_per_task=4), ALGORITHMS[name](), network)
        obs = torch.from_numpy(engine.reset())
        while learner.updates < 8:
            obs = collect(engine, learner, obs, 1)
            while learner.ready():
                if measure:
                    learner.measure_conflict()
                learner.update()
        return learner, torch.get_rng_state()

    (plain, plain_random), (measured, measured_random) = train(False), train(True)
    assert torch.equal(plain_random, measured_random)
    for module, other in zip(plain.trained_modules().values(), measured.trained_modules().values(), strict=True):
        for one, two in zip(module.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
    assert plain.gradient_grams() == {}
    grams = measured.gradient_grams()
    assert list(grams) == ["actor", "critic"]
    for gram in grams.values():
        assert gram.shape == (8, 8)
        assert torch.allclose(gram, gram.t())
        assert float(gram.diagonal().min()) > 0


def test_independent_networks_have_no_conflict_to_measure() -> None:
    _, engine, learner = build(
        PointMassConfig(envs_per_task=4), ALGORITHMS["ppo"](), IndependentConfig(hidden=[16])
    )
    obs = torch.from_numpy(engine.reset())
    learner.measure_conflict()
    while learner.updates == 0:
        obs = collect(engine, learner, obs, 1)
        while learner.ready():
            learner.update()
    assert learner.gradient_grams() == {}
