"""Widths that follow from a number of active parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from varshare_rl.algorithms.ppo import PPOConfig
from varshare_rl.algorithms.sac import SACConfig
from varshare_rl.assemble import build_algorithm, build_suite, parameter_count
from varshare_rl.config import TrainConfig
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.errors import UserError
from varshare_rl.nn import CAREConfig, MOOREConfig, NetworkConfig, Posterior, SharedConfig, VarShareLoRAConfig
from varshare_rl.nn.parameters import match_width
from varshare_rl.registry import registered

NETWORKS = sorted(registered("network"))
ALGORITHMS: dict[str, type] = {"ppo": PPOConfig, "sac": SACConfig}


def build(network: Any, algorithm: str) -> tuple[TrainConfig, int]:
    """The configuration after an agent was built from it, and the agent's active parameters per task."""
    config = TrainConfig(PointMassConfig(), ALGORITHMS[algorithm](), network)
    suite = build_suite(config)
    count = parameter_count(build_algorithm(config, suite, torch.device("cpu")), len(suite.task_names))
    return config, count.active_per_task


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("target", [100_000, 400_000])
def test_agents_match_within_two_percent(name: str, algorithm: str, target: int) -> None:
    config, active = build(registered("network")[name](active_parameters=target), algorithm)
    assert abs(active - target) <= 0.02 * target
    assert len(config.network.hidden) == 2
    assert len(set(config.network.hidden)) == 1


@pytest.mark.parametrize("layers", [1, 3])
def test_the_number_of_layers_stays(layers: int) -> None:
    config, active = build(
        VarShareLoRAConfig(hidden=[5] * layers, active_parameters=50_000, layer_norm=True), "ppo"
    )
    assert len(config.network.hidden) == layers
    assert abs(active - 50_000) <= 1_000


def test_the_width_is_the_nearest() -> None:
    """One network 3 -> w -> 2: 6 w + 2 parameters, and 4 more columns for the one-hot task: 10 w + 2."""

    def width(target: int) -> list[int]:
        options = SharedConfig(hidden=[1], active_parameters=target)
        return match_width(options, lambda candidate: [candidate.build(3, 2, 4, Posterior())], 4)

    assert width(1_002) == [100]
    assert width(1_006) == [100]
    assert width(1_008) == [101]
    assert width(12) == [1]
    assert width(22) == [2]


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        (
            SharedConfig(active_parameters=30),
            r"is 30; the smallest network=shared with 2 hidden layers has \d+; give",
        ),
        (CAREConfig(active_parameters=20_000), r"is 20000; the smallest network=care with 2 hidden layers has \d+"),
        (
            SharedConfig(hidden=[1], active_parameters=155),
            r"the nearest of network=shared with 1 hidden layers are ",
        ),
        (
            SharedConfig(hidden=[], active_parameters=155),
            r"network\.hidden has none; give network\.hidden=\[64,64\]",
        ),
    ],
)
def test_the_impossible_is_refused_in_one_line(architecture: NetworkConfig, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        build(architecture, "ppo")
    assert "\n" not in str(error.value)


def test_the_smallest_agent_has_room_for_its_experts() -> None:
    with pytest.raises(UserError, match="the smallest network=moore with 2 hidden layers has") as error:
        build(MOOREConfig(experts=9, active_parameters=500), "ppo")
    smallest = int(str(error.value).split(" has ")[1].split(";")[0])
    config, active = build(MOOREConfig(experts=9, active_parameters=smallest), "ppo")
    assert config.network.hidden == [9, 9]
    assert active == smallest


def test_finding_the_width_does_not_move_the_random_state() -> None:
    """The agent is the one that its resolved configuration gives."""
    torch.manual_seed(3)
    config, _ = build(VarShareLoRAConfig(active_parameters=30_000), "sac")
    after = torch.rand(3)
    torch.manual_seed(3)
    build(VarShareLoRAConfig(hidden=config.network.hidden), "sac")
    assert torch.equal(torch.rand(3), after)
