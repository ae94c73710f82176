"""Every file in ``configs/experiment``: what it says, that nothing else gets into it, and that it trains."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import Command
from omegaconf import OmegaConf

from varshare_rl.assemble import build_algorithm, build_suite, parameter_count
from varshare_rl.cli import compose
from varshare_rl.config import TrainConfig, config_folder, flat_options
from varshare_rl.errors import UserError
from varshare_rl.optim.gradient import TEMPERATURE
from varshare_rl.registry import registered

FOLDER = config_folder() / "experiment"
DOCS = config_folder().parent / "docs" / "recipes.md"

#: What all published recipes with SAC have in common.
SAC: dict[str, Any] = {
    "env.benchmark": "mt10", "env.envs_per_task": 1, "env.horizon": 500, "env.reward_function_version": "v2",
    "algorithm.name": "sac", "algorithm.discount": 0.99, "algorithm.target_rate": 0.005,
    "algorithm.learning_rate": 3e-4, "algorithm.critic_learning_rate": 3e-4,
    "algorithm.normalize_observations": False, "network.activation": "relu",
}  # fmt: skip
#: Those of Meta-World+.
PLUS = SAC | {
    "total_transitions": 20_000_000, "algorithm.replay_capacity_per_task": 100_000,
    "algorithm.batch_per_task": 128, "algorithm.start_transitions_per_task": 4000,
    "algorithm.updates_per_transition_per_task": 1.0, "algorithm.initial_entropy_coefficient": 1.0,
    "algorithm.target_entropy_per_dimension": -1.0, "algorithm.max_grad_norm": 1.0,
    "algorithm.reward_scale": "none", "algorithm.resets": 0, "critic.popart": False, "critic.loss": "squared",
}  # fmt: skip
TOPPO = {
    "algorithm.name": "ppo", "network.name": "shared", "network.hidden": "[400, 400, 400]",
    "network.activation": "relu", "network.layer_norm": False, "critic.popart": True, "critic.layer_norm": True,
    "algorithm.rollout_transitions_per_task": 10_000, "algorithm.epochs": 16, "algorithm.minibatches": 32,
    "algorithm.learning_rate": 3e-4, "algorithm.critic_learning_rate": 3e-4, "algorithm.discount": 0.99,
    "algorithm.gae_lambda": 0.97, "algorithm.clip": 0.2, "algorithm.entropy_weight": 5e-3,
    "algorithm.max_grad_norm": 1.0, "algorithm.target_kl": "None", "algorithm.reward_scale": "none",
    "algorithm.normalize_observations": False, "gradient.actor": "pcgrad", "gradient.critic": "fairgrad",
}  # fmt: skip
WIDE = {"network.hidden": "[400, 400, 400]", "gradient.actor": "mean", "gradient.critic": "mean"}
ALPHA = {"algorithm.entropy_learning_rate": 3e-4}
POPART = {"network.name": "varshare_lora", "critic.popart": True, "critic.layer_norm": True}
#: The settings of every recipe in full, whether they are defaults or not: a new default must not change a recipe.
RECIPES: dict[str, dict[str, Any]] = {
    "mtmhsac_mt10": PLUS | WIDE | ALPHA | {"network.name": "multi_head"},
    "softmodules_mt10": PLUS | ALPHA | {
        "network.name": "soft_modularization", "network.hidden": "[256, 256]", "network.modules": 2,
        "network.embedding": 400, "gradient.actor": "softmax_temperature",
        "gradient.critic": "softmax_temperature",
    },
    "paco_mt10": PLUS | WIDE | ALPHA | {"network.name": "paco", "network.parameter_sets": 5},
    "moore_mt10": PLUS | WIDE | {
        "network.name": "moore", "network.experts": 4, "network.multi_head": True,
        "algorithm.entropy_learning_rate": 1e-4,
    },
    "care_mt10": PLUS | WIDE | ALPHA | {
        "network.name": "care", "network.experts": 6, "network.encoder_width": 50, "network.context": 50,
    },
    "brc_mt10": SAC | ALPHA | {
        "network.name": "task_embedding", "network.embedding": 32, "network.blocks": "bronet",
        "network.hidden": "[256, 256]", "critic.hidden": "[4096, 4096, 4096]", "critic.blocks": "bronet",
        "critic.loss": "categorical", "critic.bins": 101, "critic.value_min": -10.0, "critic.value_max": 10.0,
        "critic.popart": True, "optimizer.weight_decay": 1e-4, "total_transitions": 10_000_000,
        "algorithm.batch_per_task": 102, "algorithm.updates_per_transition_per_task": 2.0,
        "algorithm.initial_entropy_coefficient": 0.1, "algorithm.target_entropy_per_dimension": -0.5,
        "algorithm.max_grad_norm": 0.0, "algorithm.replay_capacity_per_task": 1_000_000,
        "algorithm.start_transitions_per_task": 5000,
    },
    "ars_mt10": SAC | ALPHA | {
        "network.name": "shared", "network.hidden": "[400, 400, 400, 400]", "network.layer_norm": False,
        "critic.activation": "tanh", "critic.layer_norm": True, "algorithm.reward_scale": "ars",
        "algorithm.resets": 4, "algorithm.batch_per_task": 100, "algorithm.max_grad_norm": 0.0,
        "algorithm.start_transitions_per_task": 25_000, "total_transitions": 20_000_000,
        "algorithm.updates_per_transition_per_task": 1.0, "algorithm.initial_entropy_coefficient": 1.0,
        "algorithm.replay_capacity_per_task": 1_000_000, "algorithm.target_entropy_per_dimension": -1.0,
    },
    "toppo_mt10": TOPPO | {"env.benchmark": "mt10", "total_transitions": 20_000_000},
    "toppo_mt50": TOPPO | {"env.benchmark": "mt50", "total_transitions": 100_000_000},
    "varshare_lora_ppo_mt10": POPART | {
        "env.benchmark": "mt10", "algorithm.name": "ppo", "gradient.actor": "mean", "gradient.critic": "mean",
        "algorithm.observation_statistics": "suite", "env.envs_per_task": 10, "network.hidden": "[256, 256]",
    },
    "varshare_lora_sac_mt10": POPART | {
        "env.benchmark": "mt10", "algorithm.name": "sac", "gradient.actor": "mean", "gradient.critic": "pcgrad",
    },
}  # fmt: skip
CPU = [
    "ars_mt10_cpu", "brc_mt10_cpu", "care_mt10_cpu", "moore_mt10_cpu", "mtmhsac_mt10_cpu", "paco_mt10_cpu",
    "softmodules_mt10_cpu", "toppo_mt50_cpu", "varshare_lora_sac_mt10_cpu",
]  # fmt: skip
#: What a recipe for a CPU may change: sizes, never the method.
SIZES = {
    "total_transitions", "env.envs_per_task", "network.hidden", "critic.hidden",
    "algorithm.updates_per_transition_per_task", "algorithm.replay_capacity_per_task",
    "algorithm.start_transitions_per_task", "algorithm.rollout_transitions_per_task", "algorithm.epochs",
    "algorithm.minibatches",
}  # fmt: skip


@cache
def composed(*overrides: str) -> TrainConfig:
    return cast(TrainConfig, compose("train", overrides))


def test_every_recipe_is_tested_and_documented() -> None:
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == {*RECIPES, *CPU}
    text = DOCS.read_text()
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", RECIPES)
def test_says_what_was_published(name: str) -> None:
    config = composed(f"+experiment={name}")
    flat = flat_options(config)
    assert {key: flat[key] for key in RECIPES[name]} == RECIPES[name]


def test_the_recipe_for_ppo_is_the_benchmark_alone() -> None:
    recipe, alone = (flat_options(composed(word)) for word in ("+experiment=varshare_lora_ppo_mt10", "env=mt10"))
    differing = {name for name in recipe if recipe[name] != alone[name]}
    assert differing <= {"algorithm.reward_scale"}  # which null means under PopArt


@pytest.mark.parametrize("name", CPU)
def test_a_recipe_for_a_cpu_changes_sizes_alone(name: str) -> None:
    small = composed(f"+experiment={name}")
    own, whole = flat_options(small), flat_options(composed(f"+experiment={name.removesuffix('_cpu')}"))
    changed = {key for key in own if own[key] != whole[key]}
    assert changed
    assert changed <= SIZES
    assert small.total_transitions < composed(f"+experiment={name.removesuffix('_cpu')}").total_transitions


@pytest.mark.parametrize("name", RECIPES)
def test_builds_at_its_size(name: str) -> None:
    small = ["algorithm.replay_capacity_per_task=10"] if RECIPES[name]["algorithm.name"] == "sac" else []
    if name == "brc_mt10":  # 268 million parameters
        small.append("critic.hidden=[64,64,64]")
    config = composed(f"+experiment={name}", *small)
    suite = build_suite(config)
    assert len(suite.task_names) == int(name.rpartition("mt")[2])
    algorithm = build_algorithm(config, suite, torch.device("cpu"))
    assert algorithm.trained_modules().keys() == {"actor", "critic"}
    if name == "toppo_mt50":  # published as 717 thousand
        assert abs(parameter_count(algorithm, 50).stored - 717_000) < 3_500


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_line_wins_over_a_recipe_and_a_recipe_over_tuned_values(name: str) -> None:
    chosen = ["env=pointmass", "algorithm.learning_rate=0.5", "network.hidden=[8,8]", "critic.hidden=[8]"]
    config = composed(f"+experiment={name}", *chosen, "total_transitions=123")
    assert config.env.name == "pointmass"
    assert (config.network.hidden, config.critic.hidden) == ([8, 8], [8])
    assert (config.algorithm.learning_rate, config.total_transitions) == (0.5, 123)
    tuned = ("env=pointmass", f"algorithm={config.algorithm.name}")  # for which there are tuned values
    assert composed(f"+experiment={name}", *tuned).algorithm == composed(f"+experiment={name}").algorithm


@pytest.mark.parametrize("name", [*RECIPES, *(pytest.param(name, marks=pytest.mark.slow) for name in CPU)])
def test_makes_an_update(command: Command, folder: Path, name: str) -> None:
    small = [
        "env=pointmass", "env.envs_per_task=2", "env.horizon=10", "total_transitions=320", "network.hidden=[8]",
        "critic.hidden=[8]", "log.quiet=true", "checkpoint.every=0", "evaluate.every=0", "evaluate.episodes=1",
        "observe.every=0", "device=cpu", "run_dir=run",
    ]  # fmt: skip
    if "ppo" in name:
        small += ["algorithm.rollout_transitions_per_task=20", "algorithm.epochs=1", "algorithm.minibatches=1"]
        small += ["algorithm.observation_statistics=running"]  # point masses have no scales
    else:
        small += ["algorithm.start_transitions_per_task=36", "algorithm.batch_per_task=8"]
        small += ["algorithm.replay_capacity_per_task=100"]
    outcome = command("train", f"+experiment={name}", *small)
    assert outcome.code == 0, outcome.err
    assert json.loads((folder / "run" / "summary.json").read_text())["updates"] >= 1


def choices(group: str) -> list[str]:
    """The names that ``<group>=`` takes on the command line, the defaults first."""
    names = {path.stem for path in (config_folder() / group).glob("*.yaml")}
    if group != "critic":
        names |= {*registered(group)}
    if group == "env":
        names -= {"gymnasium", "objects", "cw20"}  # which need more to be chosen, or another command
    return [DEFAULTS[group], *sorted(names - {DEFAULTS[group]})]


DEFAULTS = {
    "gradient": "mean", "critic": "default", "network": "varshare_lora", "env": "mt10",
    "elbo/schedule": "constant", "elbo/prior": "fixed",
}  # fmt: skip
CHOICES = {group: choices(group) for group in DEFAULTS}
COMMON = ("hidden", "activation", "layer_norm", "active_parameters", "blocks")  # of every network
ROUNDS = max(len(names) for names in CHOICES.values())


def test_recipes_choose_parts_by_name_alone() -> None:
    """What a recipe sets by itself, no choice replaces; so it does that for what every choice has."""
    for path in FOLDER.glob("*.yaml"):
        body = OmegaConf.load(path)
        assert not {"gradient", "critic"} & body.keys(), path.name
        own = {"temperature"} if path.stem == "varshare_lora_ppo_mt10" else set()  # which every choice has
        assert body.get("elbo", {}).keys() == own, path.name
        assert body.get("network", {}).keys() <= set(COMMON), path.name
        assert body.get("env", {}).keys() <= {"envs_per_task"}, path.name


@pytest.mark.parametrize(
    ("name", "turn"),
    [
        *product([*RECIPES, *CPU], [0]),
        *product(RECIPES, [1]),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in product([*RECIPES, *CPU], range(2, ROUNDS))),
    ],
)
def test_every_choice_on_the_command_line_is_obeyed(name: str, turn: int) -> None:
    """The usual choices in the first turn; in the others each recipe has one of every group after another."""
    at = 0 if turn == 0 else turn + [*RECIPES, *CPU].index(name)
    algorithm = "ppo" if "ppo" in name else "sac"
    refused = {TEMPERATURE} if algorithm == "ppo" else set()  # it weighs by SAC's entropy coefficients
    open_to_it = {group: [one for one in names if one not in refused] for group, names in CHOICES.items()}
    chosen = [f"{group}={names[at % len(names)]}" for group, names in open_to_it.items()]
    config, usual = composed(f"+experiment={name}", *chosen), composed(*chosen, f"algorithm={algorithm}")
    assert config.critic == usual.critic
    assert config.gradient == usual.gradient
    temperature = 0.3 if name == "varshare_lora_ppo_mt10" else 1.0  # a recipe's own, whatever is chosen
    assert config.elbo == replace(usual.elbo, temperature=temperature)
    assert replace(config.env, envs_per_task=1) == replace(usual.env, envs_per_task=1)
    same = {part: getattr(usual.network, part) for part in COMMON}
    assert replace(config.network, **same) == usual.network


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_of_an_algorithm_are_for_that_one(name: str) -> None:
    other = "sac" if "ppo" in name else "ppo"
    with pytest.raises(
        UserError, match=rf"^experiment/\w+ sets \w+, which {other.upper()}Config does not have: .*"
    ):
        composed(f"+experiment={name}", f"algorithm={other}")
