"""The time of PPO's update with every architecture of the grid, as a ratio to ``shared``."""

from __future__ import annotations

from functools import partial

import torch

from experiments.architectures.grid import NETWORKS, SUITES, configuration
from experiments.bench.contenders import Contender, Round, Setting, measure
from experiments.bench.learners import step
from experiments.bench.report import Ratio, Section
from experiments.bench.update import rounds_of
from varshare_rl.algorithms.ppo import PPO
from varshare_rl.assemble import build_algorithm, build_suite, build_task_spec


def _update(suite: str, network: str, setting: Setting) -> Round:
    """One epoch over a rollout of the run's size, on made-up transitions; never stopped early."""
    torch.manual_seed(0)
    fixed = ["algorithm.epochs=1", "algorithm.target_kl=null"]
    if setting.quick:
        fixed += [
            "algorithm.rollout_transitions_per_task=40",
            "network.active_parameters=null",
            "network.hidden=[8]",
        ]
    config = configuration(suite, network, *fixed)
    made = build_suite(config)
    device = torch.device("cpu")
    algorithm = build_algorithm(config, made, device)
    assert isinstance(algorithm, PPO)
    spec = build_task_spec(made, config.env.envs_per_task, device)
    while not algorithm.ready():
        step(algorithm, spec.num_tasks, spec.envs_per_task, spec.obs_size)

    def update() -> None:
        algorithm.rollout.position = algorithm.rollout.vector_steps  # the same rollout again
        algorithm.update()

    return rounds_of(update, setting.pick(3, 1))


CONTENDERS: dict[str, Contender] = {
    f"{suite} {network}": partial(_update, suite, network) for suite in SUITES for network in NETWORKS
}


def run(rounds: int, setting: Setting) -> list[Section]:
    """One section per suite, named by it."""
    sections = []
    for suite in SUITES:
        first, *others = names = [f"{suite} {network}" for network in NETWORKS]
        values = measure(__name__, names, rounds, setting)
        sections.append(Section(suite, "ms per epoch", values, [Ratio(name, first) for name in others]))
    return sections
