"""Every file in ``configs`` composes, checks and, for a representative set, trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import gymnasium
import pytest
from conftest import Command
from helpers import TINY_ALGORITHM
from omegaconf import OmegaConf

from varshare_rl.assemble import build_suite
from varshare_rl.cli import compose
from varshare_rl.config import FORMER_DEFAULTS, TrainConfig, compared_options, config_folder, load_config
from varshare_rl.nn.config import PosteriorStart, PriorUnits
from varshare_rl.optim.gradient import MEAN, TEMPERATURE, AggregateScale
from varshare_rl.optim.optimizer import OwnGradients
from varshare_rl.registry import lookup, registered

CONFIGS = config_folder()


def files(group: str) -> set[str]:
    return {path.stem for path in (CONFIGS / group).glob("*.yaml")}


#: What an environment does not start without.
NEEDED = {
    "mt1": ["env.tasks=[reach-v3]"],
    "metaworld": ["env.tasks=[reach-v3,push-v3]"],
    "gymnasium": ["env.ids=[Hopper-v5,Walker2d-v5]"],
}
DISCRETE = {"cartpole", "lunarlander"}
ENVIRONMENTS = [
    "cartpole", "cw10", "cw20", "gymnasium", "light8", "lunarlander", "metaworld", "mt1", "mt10", "mt25", "mt3",
    "mt50", "pointmass",
]  # fmt: skip
NETWORKS = [
    "care", "film", "independent", "l2_soft", "lora", "moore", "multi_head", "paco", "shared",
    "soft_modularization", "task_embedding", "varshare", "varshare_lora",
]  # fmt: skip


def composed(*overrides: str) -> TrainConfig:
    return cast(TrainConfig, compose("train", overrides))


def test_groups_have_their_choices() -> None:
    assert sorted({*registered("env"), *files("env")}) == sorted([*ENVIRONMENTS, "objects"])
    assert [*registered("algorithm")] == ["ppo", "sac"]
    assert [*registered("elbo/schedule")] == ["band", "constant", "dual", "free_bits", "ramp"]
    assert [*registered("elbo/prior")] == ["adaptive", "fixed", "learned"]
    assert [*registered("network")] == NETWORKS
    assert len(registered("gradient")) == 13


def test_no_file_only_mirrors_a_component() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        text = "".join(line for line in path.read_text().splitlines(True) if not line.startswith("#"))
        body = OmegaConf.create(text)
        only = set(body) == {"defaults"} and list(body.defaults) == [f"{path.stem}_schema"]
        assert not only, path


def test_every_tuned_file_of_a_method_belongs_to_a_combination() -> None:
    pairs = {f"{env}_{algorithm}" for env in ENVIRONMENTS for algorithm in registered("algorithm")}
    assert files("tuned_method") <= {f"{pair}_{method}" for pair in pairs for method in registered("method")}


def test_every_tuned_file_belongs_to_a_combination() -> None:
    assert files("tuned") <= {f"{env}_{algorithm}" for env in ENVIRONMENTS for algorithm in registered("algorithm")}


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
@pytest.mark.parametrize("env", [env for env in ENVIRONMENTS if env != "cw20"])  # repeats are for continual
def test_every_environment_composes_with_every_algorithm(env: str, algorithm: str) -> None:
    config = composed(f"env={env}", f"algorithm={algorithm}", *NEEDED.get(env, []))
    assert type(config.algorithm) is lookup("algorithm", algorithm)
    assert type(config.network) is lookup("network", "varshare_lora")
    suite = build_suite(config)
    assert (env in DISCRETE) == isinstance(suite.action_space, gymnasium.spaces.Discrete)
    sizes = {"mt1": 1, "mt3": 3, "mt10": 10, "mt25": 25, "mt50": 50, "pointmass": 8, "lunarlander": 3}
    assert len(suite.task_names) == sizes.get(env, len(suite.task_names))


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_composes_with_every_algorithm(network: str, algorithm: str) -> None:
    config = composed("env=pointmass", f"network={network}", f"algorithm={algorithm}")
    assert type(config.network) is lookup("network", network)
    assert config.network.name == network
    assert type(config.algorithm) is lookup("algorithm", algorithm)


@pytest.mark.parametrize("name", registered("gradient"))
def test_every_gradient_is_for_both_and_can_be_chosen_apart(tmp_path: Path, name: str) -> None:
    both = composed("env=pointmass", "algorithm=sac", f"gradient={name}")
    assert (both.gradient.actor, both.gradient.critic) == (name, name)
    apart = composed("env=pointmass", "algorithm=sac", f"gradient.critic={name}")
    assert (apart.gradient.actor, apart.gradient.critic) == (MEAN, name)
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(both)))
    assert load_config(path) == both


def test_a_configuration_of_before_the_options_is_read_as_it_was_meant(tmp_path: Path) -> None:
    config = composed("env=mt10", "elbo.prior_scale=1", "gradient=pcgrad")
    stored: Any = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))
    for name in FORMER_DEFAULTS:
        parent, _, key = name.rpartition(".")
        OmegaConf.select(stored, parent).pop(key)
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(stored))
    read = load_config(path)
    assert (read.elbo.prior_units, read.elbo.start) == (PriorUnits.absolute, PosteriorStart.narrow)
    assert (read.optimizer.own_gradients, read.optimizer.adapter_epsilon) == (OwnGradients.averaged, None)
    assert read.gradient.scale is AggregateScale.paper
    assert read.env.staggered_resets is False
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(composed("env=pointmass"))))
    assert not hasattr(load_config(path).env, "staggered_resets")  # which has no such option


def test_fixed_keys() -> None:
    """Others script against these names: changing one breaks them."""
    config = composed()
    keys = {
        "env", "algorithm", "network", "elbo", "gradient", "optimizer", "divergence_guard", "total_transitions",
        "seed", "device", "run_dir", "resume",
        "evaluate", "checkpoint", "log",
    }  # fmt: skip
    assert set(vars(config)) >= keys
    assert hasattr(config.evaluate, "every")
    assert hasattr(config.checkpoint, "every")
    assert hasattr(config.elbo, "kl_weight")
    for device in ("auto", "cpu", "cuda"):
        assert composed(f"device={device}").device.value == device


def test_defaults_are_those_that_are_promised() -> None:
    config = composed("env=mt10")
    assert config.network.name == "varshare_lora"
    assert config.total_transitions == 20_000_000
    assert config.device.value == "auto"
    assert config.run_dir is None
    assert config.resume is None
    assert config.env.reward_function_version == "v2"
    assert config.env.goals_per_task == 50
    assert config.env.horizon == 500
    assert (composed()) == config  # python -m varshare_rl.train


@pytest.mark.parametrize("env", ["metaworld", "mt1", "mt3", "mt10", "mt25", "mt50"])
def test_meta_world_alone_is_a_good_setting_and_every_choice_replaces_its_own(env: str) -> None:
    ppo, sac = composed(f"env={env}"), composed(f"env={env}", "algorithm=sac")
    for config in (ppo, sac):
        assert (config.critic.popart, config.critic.layer_norm) == (True, True)
    assert (ppo.algorithm.observation_statistics.value, ppo.algorithm.gae_lambda) == ("suite", 0.97)
    assert (ppo.env.envs_per_task, ppo.env.staggered_resets) == (10, True)
    assert (ppo.algorithm.noise_correlation, ppo.elbo.temperature) == (0.5, 0.3)
    assert (sac.algorithm.noise_correlation, sac.elbo.temperature) == (0.0, 1.0)
    assert ppo.network.hidden == [256, 256]
    plain = composed(f"env={env}", "critic=default")
    assert (plain.critic.popart, plain.critic.layer_norm) == (False, None)
    assert composed(f"env={env}", "critic=brc").critic.layer_norm is None
    assert composed(f"env={env}", "algorithm.gae_lambda=0.9").algorithm.gae_lambda == 0.9


def test_overrides_win_over_every_file() -> None:
    for env in ("pointmass", "mt10"):
        for algorithm in ("ppo", "sac"):
            config = composed(
                f"env={env}", f"algorithm={algorithm}", "total_transitions=123", "algorithm.learning_rate=0.5",
                "network.hidden=[3]", "elbo.kl_weight=7", "env.envs_per_task=2",
            )  # fmt: skip
            assert config.total_transitions == 123
            assert config.algorithm.learning_rate == 0.5
            assert config.network.hidden == [3]
            assert config.elbo.kl_weight == 7.0
            assert config.env.envs_per_task == 2


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_a_written_configuration_is_read_back(tmp_path: Path, algorithm: str, network: str) -> None:
    config = composed("env=pointmass", f"network={network}", f"algorithm={algorithm}", "seed=5")
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert load_config(path) == config


SMALL = (
    "network.hidden=[8]", "log.quiet=true", "log.every=1", "checkpoint.every=0", "evaluate.every=0",
    "evaluate.episodes=1", "device=cpu", "env.envs_per_task=2", "run_dir=run",
)  # fmt: skip


def pairs(algorithm: str, left_out: str) -> list[tuple[str, str, str]]:
    """Each network that tasks share parts of with an aggregator, and each aggregator with a network."""
    networks = [name for name in NETWORKS if name != "independent"]
    gradients = [name for name in registered("gradient") if name != left_out]
    turns = range(max(len(networks), len(gradients)))
    return [(algorithm, networks[turn % len(networks)], gradients[turn % len(gradients)]) for turn in turns]


#: Every network and every aggregator with both algorithms; the mean also for networks with nothing in common.
PAIRS = [
    *pairs("ppo", TEMPERATURE), *pairs("sac", MEAN), ("ppo", "independent", MEAN), ("sac", "independent", MEAN),
]  # fmt: skip
TRAINED: dict[str, tuple[str, ...]] = {
    **{
        f"pointmass_{algorithm}_{network}_{gradient}": (
            "env=pointmass", "env.horizon=10", f"algorithm={algorithm}", f"network={network}",
            f"gradient={gradient}", "total_transitions=320",
        )
        for algorithm, network, gradient in PAIRS
    },
    **{
        f"{critic}_{algorithm}": (
            "env=pointmass", "env.horizon=10", f"algorithm={algorithm}", f"critic={critic}",
            "total_transitions=320",
        )
        for algorithm in ("ppo", "sac")
        for critic in ("brc", "popart")
    },
    "pointmass_apart": (
        "env=pointmass", "env.horizon=10", "gradient.actor=pcgrad", "gradient.critic=fairgrad",
        "gradient.fairgrad.alpha=2", "optimizer.schedule=cosine", "optimizer.warmup=0.1",
        "optimizer.weight_decay=0.01", "optimizer.rho_lr_scale=3", "divergence_guard.explosion=100",
        "total_transitions=320",
    ),
    "cartpole": ("env=cartpole", "env.horizon=20", "total_transitions=240"),
    "cartpole_identical": ("env=cartpole", "env.variant_set=identical", "env.horizon=20", "total_transitions=160"),
    "lunarlander": ("env=lunarlander", "env.horizon=20", "env.workers=1", "total_transitions=120"),
    "lunarlander_continuous_sac": (
        "env=lunarlander", "algorithm=sac", "env.continuous=true", "env.horizon=20", "env.workers=1",
        "total_transitions=120",
    ),
    "gymnasium_padded_sac": (
        "env=gymnasium", "algorithm=sac", "env.ids=[Hopper-v5,Walker2d-v5]", "env.horizon=20", "env.workers=1",
        "total_transitions=80",
    ),
    "metaworld": (
        "env=metaworld", "env.tasks=[reach-v3,drawer-close-v3]", "env.horizon=20", "env.workers=1",
        "env.goals_per_task=2", "total_transitions=80",
    ),
    "metaworld_sac": (
        "env=mt1", "algorithm=sac", "env.tasks=[reach-v3]", "env.horizon=20", "env.workers=1",
        "env.goals_per_task=2", "total_transitions=40",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_makes_an_update(command: Command, folder: Path, name: str) -> None:
    arguments = TRAINED[name]
    algorithm = "sac" if "algorithm=sac" in arguments else "ppo"
    small = [item for item in TINY_ALGORITHM[algorithm] if "rollout" not in item and "start" not in item]
    small += [
        "algorithm.rollout_transitions_per_task=20"
        if algorithm == "ppo"
        else "algorithm.start_transitions_per_task=4"
    ]
    outcome = command("train", *arguments, *SMALL, *small)
    assert outcome.code == 0, outcome.err
    summary: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["updates"] >= 1
    assert (summary["mean_success"] is None) == name.startswith("gymnasium")
    assert summary["transitions"] == int(arguments[-1].rpartition("=")[2])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {name: value for line in lines for name, value in line.items() if name.startswith("loss/")}
    assert losses
    assert None not in losses.values()  # a loss that is not a number


def test_runs_are_compared_by_their_choices_and_by_what_is_not_at_its_default() -> None:
    changed = [
        "elbo.kl_weight=0.5",
        "network.rank=3",
        "elbo/schedule=ramp",
        "elbo.schedule.late=0.7",
        "log.every=9",
    ]
    options = compared_options(compose("train", ["env=mt10", "algorithm=sac", "seed=4", *changed]))
    assert list(options)[:6] == ["env", "algorithm", "network", "elbo.kl_weight", "seed", "total_transitions"]
    assert options.items() >= {
        "env": "mt10", "algorithm": "sac", "network": "varshare_lora", "elbo.kl_weight": 0.5, "seed": 4,
        "network.rank": 3, "elbo.schedule.late": 0.7,
    }.items()  # fmt: skip
    assert not {"log.every", "env.horizon", "run_dir", "network.alpha"} & options.keys()
