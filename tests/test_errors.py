"""What a user can get wrong: one line on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM

import varshare_rl
from varshare_rl.run.folder import held_folder

PROJECT = Path(varshare_rl.__file__).resolve().parent.parent
POINTMASS = ("env=pointmass",)
WITHOUT_RUN = {
    "unknown_key": (("env=pointmass", "no_such_key=1"), "no_such_key"),
    "unknown_key_of_a_component": (("env=pointmass", "algorithm.clipp=0.1"), "clipp"),
    "unknown_key_of_another_component": (("algorithm=sac", "algorithm.clip=0.1"), "clip"),
    "no_whole_number": (
        ("env=pointmass", "total_transitions=many"),
        "total_transitions=many is not possible: it must be a whole number",
    ),
    "no_whole_number_of_a_component": (
        ("env=pointmass", "algorithm.epochs=1.5"),
        "algorithm.epochs=1.5 is not possible: it must be a whole number",
    ),
    "no_number": (("env=pointmass", "elbo.kl_weight=high"), "it must be a number"),
    "no_truth": (("env=pointmass", "log.quiet=very"), "it must be true or false"),
    "no_value": (
        ("env=pointmass", "evaluate.every=null"),
        "evaluate.every=null is not possible: it must have a value",
    ),
    "no_value_in_a_list": (("env=pointmass", "network.hidden=[8,null]"), "it must have a value"),
    "no_list": (("env=pointmass", "env.tasks=normal_left"), "it takes a list, [a,b]"),
    "horizon_without_end": (("env=pointmass", f"env.horizon={2**63}"), "it must be between 1 and 1000000000"),
    "epochs_without_end": (("env=pointmass", f"algorithm.epochs={10**21}"), "it must be between 1 and 1000000"),
    "network_too_wide": (("env=pointmass", "network.hidden=[1000000000]"), "GB of memory"),
    "rank_too_high": (("env=pointmass", "network.rank=1000000000"), "GB of memory"),
    "replay_too_large": (
        ("env=pointmass", "algorithm=sac", f"algorithm.replay_capacity_per_task={10**12}"),
        "GB of memory",
    ),
    "overlap_of_one": (
        ("env=pointmass", "overlap=true", "env.envs_per_task=1"),
        "overlap=true acts for half of a task's environments",
    ),
    "bound_that_does_not_rise": (
        ("env=pointmass", "algorithm.min_log_std_after=1000"),
        "algorithm.min_log_std_after=1000 raises the bound from -5 to algorithm.min_log_std, and that is -5",
    ),
    "not_an_override": (("env=pointmass", "seed"), "'seed' is no option; options are written name=value"),
    "broken_syntax": (("env=pointmass", "env.tasks=[normal_left"), "[normal_left"),
    "unknown_env": (("env=nowhere",), "nowhere"),
    "unknown_algorithm": (("env=pointmass", "algorithm=dqn"), "dqn"),
    "unknown_network": (("env=pointmass", "network=big"), "big"),
    "unknown_device": (("env=pointmass", "device=tpu"), "tpu"),
    "unknown_normalization": (("env=pointmass", "elbo.normalization=lots"), "lots"),
    "unknown_activation": (("env=pointmass", "network.activation=swishy"), "swishy"),
    "unknown_activation_of_the_critic": (("env=pointmass", "critic.activation=swishy"), "critic.activation"),
    "unknown_recipe": (("+experiment=nope",), "toppo_mt10"),
    "unknown_estimator": (
        ("env=pointmass", "elbo.estimator=guess"),
        "elbo.estimator=guess is not possible: it must be one of weight, local, flipout, mean",
    ),
    "no_particles": (("env=pointmass", "elbo.weight_samples=0"), "elbo.weight_samples is 0"),
    "unknown_draw": (("env=pointmass", "elbo.draw.acting=sometimes"), "sometimes"),
    "unknown_schedule": (("env=pointmass", "elbo/schedule=wave"), "wave"),
    "kl_of_no_rate": (
        ("env=pointmass", "algorithm.learning_rate=0", "algorithm.desired_kl=0.01"),
        "algorithm.desired_kl moves algorithm.learning_rate, which is 0",
    ),
    "seed_of_no_goals": (("env=mt1", "env.tasks=[reach-v3]", "env.goal_seed=-1"), "env.goal_seed is -1"),
    "decay_without_schedule": (
        ("env=pointmass", "optimizer.decay_start=0.5"),
        "optimizer.decay_start is 0.5 and counts with optimizer.schedule=linear or cosine alone",
    ),
    "end_of_entropy_without_schedule": (
        ("env=pointmass", "algorithm.final_entropy=0.5"),
        "algorithm.final_entropy is 0.5 and counts with algorithm.entropy_schedule=linear or cosine alone",
    ),
    "unknown_prior": (("env=pointmass", "elbo/prior=flat"), "flat"),
    "schedule_with_a_dot": (("env=pointmass", "elbo.schedule=ramp"), "elbo/schedule=ramp"),
    "prior_with_a_dot": (("env=pointmass", "elbo.prior=learned"), "elbo/prior=learned"),
    "key_of_another_schedule": (("env=pointmass", "elbo/schedule=ramp", "elbo.schedule.low=1"), "low"),
    "schedule_without_weight": (
        ("env=pointmass", "elbo/schedule=dual", "elbo.kl_weight=0"),
        "elbo.kl_weight is 0, from which elbo/schedule=dual cannot start",
    ),
    "ivon_without_a_price": (
        ("env=pointmass", "optimizer.posteriors=ivon", "elbo/schedule=ramp"),
        "elbo/schedule=ramp leaves it without; give constant, band or dual",
    ),
    "ivon_for_one_network": (
        ("env=pointmass", "optimizer.posteriors=ivon", "elbo.networks=actor"),
        "elbo.networks=actor leaves it without",
    ),
    "ivon_without_draws": (
        ("env=pointmass", "optimizer.posteriors=ivon", "elbo.estimator=mean"),
        "elbo.estimator=mean leaves it without",
    ),
    "rate_of_adam_with_ivon": (
        ("env=pointmass", "optimizer.posteriors=ivon", "optimizer.rho_lr_scale=3"),
        "counts with optimizer.posteriors=adam",
    ),
    "rate_of_ivon_with_adam": (
        ("env=pointmass", "optimizer.ivon.rate=0.3"), "optimizer.ivon counts with optimizer.posteriors=ivon alone"
    ),
    "no_budget": (
        ("env=pointmass", "elbo/schedule=dual", "elbo.schedule.budget_nats=0"),
        "elbo.schedule.budget_nats is 0",
    ),
    "band_upside_down": (
        ("env=pointmass", "elbo/schedule=band", "elbo.schedule.low=0.5"),
        "elbo.schedule.low is 0.5; it must be below high, 0.05",
    ),
    "long_ramps": (("env=pointmass", "elbo/schedule=ramp", "elbo.schedule.warmup=0.9"), "it must be at most 1"),
    "negative_spring": (("env=pointmass", "elbo/prior=learned", "elbo.prior.spring=-1"), "elbo.prior.spring is -1"),
    "prior_bounds": (("env=pointmass", "elbo/prior=adaptive", "elbo.prior.least=0.5"), "below most, 0.3"),
    "unknown_pointmass_task": (("env=pointmass", "env.tasks=[normal_left,nowhere]"), "nowhere"),
    "unknown_metaworld_task": (("env=metaworld", "env.tasks=[reach-v9]"), "reach-v9"),
    "unknown_gymnasium_id": (("env=gymnasium", "env.ids=[Hopper-v99]"), "Hopper-v99"),
    "unknown_lunarlander_task": (("env=lunarlander", "env.tasks=[moon]"), "moon"),
    "no_metaworld_tasks": (("env=metaworld",), "tasks"),
    "no_mt1_task": (("env=mt1",), "mt1"),
    "discrete_with_sac": (("env=cartpole", "algorithm=sac"), "Discrete"),
    "mixed_spaces": (("env=gymnasium", "env.ids=[CartPole-v1,Hopper-v5]"), "Hopper-v5"),
    "negative_total": (("env=pointmass", "total_transitions=-1"), "total_transitions is -1"),
    "no_total": (("env=pointmass", "total_transitions=0"), "total_transitions is 0"),
    "negative_seed": (("env=pointmass", "seed=-1"), "seed"),
    "huge_seed": (("env=pointmass", "seed=4294967296"), "seed"),
    "negative_hidden": (("env=pointmass", "network.hidden=[64,-2]"), "network.hidden[1] is -2"),
    "no_rank": (("env=pointmass", "network.rank=0"), "network.rank is 0"),
    "no_active_parameters": (("env=pointmass", "network.active_parameters=0"), "active_parameters is 0"),
    "few_active_parameters": (
        ("env=pointmass", "network=moore", "network.active_parameters=100"),
        "network.active_parameters is 100; the smallest network=moore with 2 hidden layers has ",
    ),
    "active_parameters_without_layers": (
        ("env=pointmass", "network.active_parameters=10000", "network.hidden=[]"),
        "network.hidden has none",
    ),
    "too_many_experts": (("env=pointmass", "network=moore", "network.experts=65"), "network.experts is 65"),
    "no_experts": (("env=pointmass", "network=care", "network.experts=0"), "network.experts is 0"),
    "no_modules": (("env=pointmass", "network=soft_modularization", "network.modules=0"), "modules is 0"),
    "no_parameter_sets": (("env=pointmass", "network=paco", "network.parameter_sets=0"), "parameter_sets is 0"),
    "no_embedding": (("env=pointmass", "network=task_embedding", "network.embedding=0"), "embedding is 0"),
    "no_hidden_layers": (("env=pointmass", "network=film", "network.hidden=[]"), "network=film needs a hidden"),
    "no_envs": (("env=pointmass", "env.envs_per_task=0"), "env.envs_per_task"),
    "no_horizon": (("env=pointmass", "env.horizon=0"), "horizon"),
    "no_epochs": (("env=pointmass", "algorithm.epochs=0"), "algorithm.epochs is 0"),
    "no_rollout": (("env=pointmass", "algorithm.rollout_transitions_per_task=0"), "per_task is 0"),
    "no_batch": (("env=pointmass", "algorithm=sac", "algorithm.batch_per_task=0"), "batch_per_task is 0"),
    "no_replay": (("env=pointmass", "algorithm=sac", "algorithm.replay_capacity_per_task=-5"), "-5"),
    "tiny_replay": (("env=pointmass", "algorithm=sac", "algorithm.replay_capacity_per_task=1"), "is 1"),
    "negative_rate": (("env=pointmass", "algorithm.critic_learning_rate=-1"), "critic_learning_rate is -1"),
    "negative_entropy": (
        ("env=pointmass", "algorithm=sac", "algorithm.initial_entropy_coefficient=-1"),
        "initial_entropy_coefficient is -1",
    ),
    "no_episodes": (("env=pointmass", "evaluate.episodes=0"), "evaluate.episodes is 0"),
    "negative_observe": (("env=pointmass", "observe.every=-1"), "observe.every is -1"),
    "negative_every": (("env=pointmass", "checkpoint.every=-1"), "checkpoint.every is -1"),
    "negative_kl_weight": (("env=pointmass", "elbo.kl_weight=-0.1"), "elbo.kl_weight is -0.1"),
    "no_prior_scale": (("env=pointmass", "elbo.prior_scale=0"), "elbo.prior_scale is 0.0"),
    "discount_above_one": (("env=pointmass", "algorithm.discount=1.5"), "must be between 0 and 1"),
    "negative_clip": (("env=pointmass", "algorithm.clip=-1"), "algorithm.clip is -1"),
    "negative_target_kl": (("env=pointmass", "algorithm.target_kl=-1"), "algorithm.target_kl is -1"),
    "no_alpha": (("env=pointmass", "network.alpha=0"), "network.alpha is 0"),
    "alpha_at_full_rank": (
        ("env=pointmass", "network=l2_soft", "network.rank=null", "network.alpha=4"), "network.alpha is 4.0"
    ),
    "noise_that_never_changes": (
        ("env=pointmass", "algorithm.noise_correlation=1"), "algorithm.noise_correlation is 1",
    ),
    "correlated_noise_of_choices": (
        ("env=cartpole", "algorithm.noise_correlation=0.5"), "algorithm.noise_correlation=0.5 is for Box actions",
    ),
    "decay_without_end": (("env=pointmass", "optimizer.decay_start=1"), "optimizer.decay_start is 1"),
    "crossed_log_stds": (("env=pointmass", "algorithm.min_log_std=3"), "min_log_std is 3"),
    "clip_of_a_distribution": (
        ("env=pointmass", "algorithm.value_clip=0.2", "critic.loss=categorical"), "algorithm.value_clip=0.2 bounds",
    ),
    "no_value_clip": (("env=pointmass", "algorithm.value_clip=0"), "algorithm.value_clip is 0.0"),
    "no_scales": (
        ("env=pointmass", "algorithm.observation_statistics=suite", "algorithm.normalize_observations=true"),
        "a suite that knows the scales",
    ),
    "scales_of_nothing": (
        ("env=mt1", "env.tasks=[reach-v3]", "algorithm=sac", "algorithm.observation_statistics=suite"),
        "algorithm.normalize_observations=false",
    ),
    "no_observation_std": (("env=pointmass", "algorithm.min_observation_std=0"), "min_observation_std is 0"),
    "unknown_policy": (("env=pointmass", "algorithm.policy=beta"), "tanh_gaussian"),
    "bf16_with_ppo": (("env=pointmass", "matmul_precision=bf16"), "matmul_precision=bf16"),
    "negative_absorb_every": (("env=pointmass", "elbo.absorb.every=-1"), "elbo.absorb.every is -1"),
    "large_absorb_rate": (("env=pointmass", "elbo.absorb.rate=2"), "elbo.absorb.rate is 2"),
    "no_absorb_rate": (("env=pointmass", "elbo.absorb.every=5", "elbo.absorb.rate=0"), "elbo.absorb.rate is 0"),
    "negative_absorb_error": (("env=pointmass", "elbo.absorb.max_error=-1"), "elbo.absorb.max_error is -1"),
    "absorb_without_residuals": (("env=pointmass", "network=shared", "elbo.absorb.every=5"), "network=shared"),
    "unknown_critic": (("env=pointmass", "critic=huge"), "huge"),
    "unknown_blocks": (("env=pointmass", "critic.blocks=lego"), "lego"),
    "unknown_value_loss": (("env=pointmass", "critic.loss=absolute"), "absolute"),
    "unknown_reward_scale": (("env=pointmass", "algorithm.reward_scale=big"), "big"),
    "one_bin": (("env=pointmass", "critic.bins=1"), "critic.bins is 1"),
    "crossed_values": (("env=pointmass", "critic.value_min=3", "critic.value_max=3"), "value_min is 3.0"),
    "endless_values": (("env=pointmass", "critic.value_max=inf"), "critic.value_max is inf"),
    "no_popart_rate": (("env=pointmass", "critic.popart_rate=0"), "popart_rate is 0.0"),
    "negative_critic_hidden": (("env=pointmass", "critic.hidden=[8,0]"), "critic.hidden[1] is 0"),
    "band_without_spread": (("env=pointmass", "network=l2_soft", "elbo/schedule=band"), "network=l2_soft"),
    "uneven_blocks": (("env=pointmass", "critic.blocks=bronet", "critic.hidden=[8,9]"), "hidden is [8, 9]"),
    "no_blocks": (("env=pointmass", "network.blocks=bronet", "network.hidden=[]"), "hidden is []"),
    "bronet_without_norm": (("env=pointmass", "critic.blocks=bronet", "critic.layer_norm=false"), "layer_norm"),
    "negative_resets": (("env=pointmass", "algorithm.resets=-1"), "algorithm.resets is -1"),
    "unknown_copy": (("env=pointmass", "env.tasks=[middle_2]"), "middle_2"),
    "few_reward_scales": (("env=pointmass", "env.reward_scales=[1,2]"), "reward_scales has 2 numbers for 8"),
    "negative_reward_scale": (
        ("env=pointmass", "env.tasks=[normal_left]", "env.reward_scales=[-1]"), "reward_scales has -1",
    ),
    "unknown_gradient": (("env=pointmass", "gradient=sum"), "sum"),
    "unknown_gradient_of_the_critic": (("env=pointmass", "gradient.critic=sum"), "sum"),
    "softmax_temperature_with_ppo": (("env=pointmass", "gradient=softmax_temperature"), "algorithm=sac"),
    "softmax_temperature_of_ppos_critic": (
        ("env=pointmass", "gradient.critic=softmax_temperature"), "gradient.critic=softmax_temperature",
    ),
    "no_tasks_in_an_update": (
        ("env=pointmass", "algorithm=sac", "algorithm.tasks_per_update=0"), "algorithm.tasks_per_update is 0",
    ),
    "a_list_by_interpolation": (("env=pointmass", "env.tasks=${seed}"), "env.tasks is 0; it must be a list"),
    "tasks_of_ppos_update": (("env=pointmass", "algorithm.tasks_per_update=2"), "tasks_per_update"),
    "combined_gradients_of_a_few_tasks": (
        ("env=pointmass", "algorithm=sac", "algorithm.tasks_per_update=2", "gradient.critic=pcgrad"),
        "gradient.critic=pcgrad compares all tasks",
    ),
    "dual_control_of_a_few_tasks": (
        ("env=pointmass", "algorithm=sac", "algorithm.tasks_per_update=2", "elbo/schedule=dual"),
        "elbo/schedule=dual compares all tasks",
    ),
    "learned_prior_of_a_few_tasks": (
        ("env=pointmass", "algorithm=sac", "algorithm.tasks_per_update=2", "elbo/prior=learned"),
        "elbo/prior=learned compares all tasks",
    ),
    "explosions_of_a_few_tasks": (
        ("env=pointmass", "algorithm=sac", "algorithm.tasks_per_update=2", "divergence_guard.explosion=5"),
        "divergence_guard.explosion=5 compares all tasks",
    ),
    "negative_cagrad_radius": (("env=pointmass", "gradient.cagrad.c=-1"), "gradient.cagrad.c is -1"),
    "no_fairness": (("env=pointmass", "gradient.fairgrad.alpha=0"), "gradient.fairgrad.alpha is 0"),
    "no_nash_iterations": (("env=pointmass", "gradient.nashmtl.iterations=0"), "nashmtl.iterations is 0"),
    "unknown_aligned_scale": (("env=pointmass", "gradient.aligned_mtl.scale=max"), "max"),
    "negative_decay": (("env=pointmass", "optimizer.weight_decay=-0.1"), "optimizer.weight_decay is -0.1"),
    "unknown_rate_schedule": (("env=pointmass", "optimizer.schedule=steps"), "steps"),
    "warmup_without_end": (("env=pointmass", "optimizer.warmup=1"), "optimizer.warmup is 1"),
    "final_rate_above_one": (("env=pointmass", "optimizer.final_rate=2"), "optimizer.final_rate is 2"),
    "negative_spread_rate": (("env=pointmass", "optimizer.rho_lr_scale=-1"), "optimizer.rho_lr_scale is -1"),
    "tiny_explosion": (("env=pointmass", "divergence_guard.explosion=0.5"), "divergence_guard.explosion is 0.5"),
    "negative_alpha": (("env=pointmass", "network.alpha=-1"), "network.alpha is -1"),
    "endless_kl_weight": (("env=pointmass", "elbo.kl_weight=inf"), "elbo.kl_weight is inf"),
    "endless_prior": (("env=pointmass", "elbo.prior_scale=inf"), "elbo.prior_scale is inf"),
    "endless_rate": (("env=pointmass", "algorithm.learning_rate=inf"), "algorithm.learning_rate is inf"),
    "no_number_for_the_entropy": (
        ("env=pointmass", "algorithm=sac", "algorithm.target_entropy_per_dimension=nan"),
        "algorithm.target_entropy_per_dimension is nan",
    ),
    "negative_workers": (("env=lunarlander", "env.workers=-1"), "env.workers is -1"),
    "group_by_a_number": (("env=pointmass", "gradient=0.5"), "group"),
    "group_by_a_switch": (("env=true",), "group"),
    "empty_run_dir": (("env=pointmass", "run_dir="), "run_dir is empty"),
    "missing_resume": (("resume=runs/nowhere",), "runs/nowhere"),
}  # fmt: skip


def assert_one_line(code: int, err: str, named: str) -> None:
    assert code == 2
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert err.strip() == " ".join(err.split())
    assert named in err, err


@pytest.mark.parametrize("name", WITHOUT_RUN)
def test_train_explains_in_one_line_and_leaves_nothing(command: Command, folder: Path, name: str) -> None:
    arguments, named = WITHOUT_RUN[name]
    outcome = command("train", "device=cpu", *arguments) if "device" not in name else command("train", *arguments)
    assert_one_line(outcome.code, outcome.err, named)
    assert list(folder.rglob("*")) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(command: Command, folder: Path) -> None:
    outcome = command("train", "env=pointmass", "device=cuda")
    assert_one_line(outcome.code, outcome.err, "device=cuda")
    assert list(folder.rglob("*")) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("episodes=3",), "run="),
        (("run=runs/nowhere",), "runs/nowhere"),
        (("run=.",), "config.yaml"),
        (("run=.", "episodes=0"), "episodes is 0"),
        (("run=.", "episodes=few"), "few"),
        (("run=.", "checkpoint=middle"), "middle"),
        (("run=.", "no_such_key=1"), "no_such_key"),
    ],
)
def test_evaluate_explains_in_one_line(
    command: Command, folder: Path, arguments: tuple[str, ...], named: str
) -> None:
    outcome = command("evaluate", *arguments)
    assert_one_line(outcome.code, outcome.err, named)
    assert list(folder.rglob("*")) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "sharing"),
        (("run=runs/nowhere",), "unknown report 'run=runs/nowhere'"),
        (("winners", "run=."), "unknown report 'winners'; there is compare, continual, sharing"),
        (("sharing",), "run="),
        (("sharing", "run=runs/nowhere"), "runs/nowhere"),
        (("sharing", "run=."), "config.yaml"),
        (("sharing", "run=.", "checkpoint=middle"), "middle"),
        (("sharing", "run=.", "no_such_key=1"), "no_such_key"),
        (("continual",), "no runs to report"),
        (("continual", "out=there"), "no runs to report"),
        (("continual", "runs/nowhere"), "runs/nowhere holds no finished continual run"),
        (("continual", "."), "there is no summary.json"),
        (("continual", "multirun.yaml"), "no run among multirun.yaml"),
        (("continual", ".", "no_such_key=1"), "no_such_key"),
        (("continual", ".", "reference=3"), "reference is 3"),
    ],
)
def test_report_explains_in_one_line(
    command: Command, folder: Path, arguments: tuple[str, ...], named: str
) -> None:
    outcome = command("report", *arguments)
    assert_one_line(outcome.code, outcome.err, named)
    assert list(folder.rglob("*")) == []


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("prune", ("threshold=0.1",), "run="),
        ("prune", ("run=runs/nowhere",), "runs/nowhere"),
        ("prune", ("run=.",), "config.yaml"),
        ("prune", ("run=runs/nowhere", "threshold=-1"), "threshold is -1"),
        ("prune", ("run=runs/nowhere", "threshold=nan"), "threshold is nan"),
        ("prune", ("run=runs/nowhere", "episodes=0"), "episodes is 0"),
        ("prune", ("run=runs/nowhere", "criterion=size"), "size"),
        ("prune", ("run=runs/nowhere", "checkpoint=middle"), "middle"),
        ("calibrate", ("episodes=3",), "run="),
        ("calibrate", ("run=runs/nowhere",), "runs/nowhere"),
        ("calibrate", ("run=.", "episodes=0"), "episodes is 0"),
        ("calibrate", ("run=.", "draws=1"), "draws is 1"),
        ("calibrate", ("run=.", "checkpoint=middle"), "unknown checkpoint 'middle'"),
        ("calibrate", ("run=.", "no_such_key=1"), "no_such_key"),
    ],
)
def test_work_on_posteriors_explains_in_one_line(
    command: Command, folder: Path, name: str, arguments: tuple[str, ...], named: str
) -> None:
    outcome = command(name, *arguments)
    assert_one_line(outcome.code, outcome.err, named)
    assert list(folder.rglob("*")) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, made in a process of its own."""
    folder = tmp_path_factory.mktemp("finished")
    overrides = [*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=160", "run_dir=run"]
    done = subprocess.run(
        [sys.executable, "-m", "varshare_rl.train", *overrides], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(finished: Path, folder: Path) -> Path:
    """A copy of the finished run, in the current folder."""
    import shutil

    shutil.copytree(finished, folder / "run")
    return Path("run")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=3", "seed=3"),
        ("env=cartpole", "env=cartpole"),
        ("network.rank=2", "network.rank=2"),
        ("algorithm.learning_rate=1", "algorithm.learning_rate=1"),
        ("elbo.kl_weight=1", "elbo.kl_weight=1"),
        ("run_dir=other", "run_dir=other"),
    ],
)
def test_resume_refuses_to_change_the_experiment(command: Command, run: Path, override: str, named: str) -> None:
    before = snapshot(run)
    outcome = command("train", f"resume={run}", "total_transitions=320", override)
    assert_one_line(outcome.code, outcome.err, named)
    assert snapshot(run) == before


def test_resume_of_a_finished_run_says_what_to_give(command: Command, run: Path) -> None:
    before = snapshot(run)
    outcome = command("train", f"resume={run}")
    assert_one_line(outcome.code, outcome.err, "total_transitions")
    assert snapshot(run) == before


def test_a_pruned_run_is_not_overwritten_and_not_trained_on(command: Command, run: Path) -> None:
    assert command("prune", f"run={run}", "out=pruned").code == 0
    before = snapshot(Path("pruned"))
    outcome = command("prune", f"run={run}", "out=pruned")
    assert_one_line(outcome.code, outcome.err, "pruned exists already")
    outcome = command("prune", f"run={run}", f"out={run}")
    assert_one_line(outcome.code, outcome.err, "run exists already")
    outcome = command("train", "resume=pruned", "total_transitions=320")
    assert_one_line(outcome.code, outcome.err, "policy without its training state")
    assert snapshot(Path("pruned")) == before


def test_resume_refuses_impossible_numbers(command: Command, run: Path) -> None:
    outcome = command("train", f"resume={run}", "total_transitions=320", "evaluate.episodes=0")
    assert_one_line(outcome.code, outcome.err, "evaluate.episodes is 0")
    outcome = command("train", f"resume={run}", "total_transitions=soon")
    assert_one_line(outcome.code, outcome.err, "soon")


def test_a_folder_without_a_checkpoint(command: Command, run: Path) -> None:
    import shutil

    shutil.rmtree(run / "checkpoints")
    for outcome in (command("train", f"resume={run}", "total_transitions=320"), command("evaluate", f"run={run}")):
        assert_one_line(outcome.code, outcome.err, "checkpoint")
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_checkpoint(command: Command, run: Path, file: str, damage: str) -> None:
    for path in sorted((run / "checkpoints").glob(f"last-*/{file}")):
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        else:
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    before = snapshot(run)
    for outcome in (command("train", f"resume={run}", "total_transitions=320"), command("evaluate", f"run={run}")):
        assert_one_line(outcome.code, outcome.err, str(path.parent))
    assert snapshot(run) == before


@pytest.mark.parametrize("content", ["", "just words", "env: {name: pointmass}", "env: [", "env: {name: moon}"])
def test_a_damaged_configuration(command: Command, run: Path, content: str) -> None:
    (run / "config.yaml").write_text(content)
    for outcome in (command("train", f"resume={run}", "total_transitions=320"), command("evaluate", f"run={run}")):
        assert_one_line(outcome.code, outcome.err, "config.yaml")


def test_a_configuration_with_a_value_of_the_wrong_type(command: Command, run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: zero"))
    outcome = command("train", f"resume={run}", "total_transitions=320")
    assert_one_line(outcome.code, outcome.err, "config.yaml")


def test_an_existing_run_is_not_overwritten(command: Command, run: Path) -> None:
    before = snapshot(run)
    outcome = command("train", *TINY, "total_transitions=160", f"run_dir={run}")
    assert_one_line(outcome.code, outcome.err, f"resume={run}")
    assert snapshot(run) == before


def test_a_run_folder_that_is_a_file(command: Command, folder: Path) -> None:
    (folder / "taken").write_text("mine")
    outcome = command("train", *TINY, "total_transitions=160", "run_dir=taken")
    assert_one_line(outcome.code, outcome.err, "taken")
    outcome = command("train", *TINY, "total_transitions=160", "run_dir=taken/below")
    assert_one_line(outcome.code, outcome.err, "taken")
    assert snapshot(folder) == {str(folder / "taken"): b"mine"}


def test_a_failed_run_leaves_an_empty_folder_that_was_there(command: Command, folder: Path) -> None:
    (folder / "mine").mkdir()
    outcome = command("train", "env=cartpole", "algorithm=sac", "run_dir=mine", "device=cpu")
    assert_one_line(outcome.code, outcome.err, "Discrete")
    assert [path.name for path in folder.rglob("*")] == ["mine"]


@pytest.mark.parametrize(
    ("module", "arguments", "named"),
    [
        ("train", ("env=cartpole", "algorithm=sac"), "Discrete"),
        ("evaluate", ("run=runs/nowhere",), "runs/nowhere"),
        ("report", ("sharing", "run=runs/nowhere"), "runs/nowhere"),
    ],
)
def test_the_same_from_the_shell(tmp_path: Path, module: str, arguments: tuple[str, ...], named: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"varshare_rl.{module}", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert_one_line(done.returncode, done.stderr, named)
    assert done.stdout == ""
    assert list(tmp_path.rglob("*")) == []


def test_an_error_of_ours_is_not_hidden(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the user got wrong becomes one line; a bug keeps its traceback."""
    from varshare_rl.commands import train

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(train, "build_suite", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        command("train", *POINTMASS)


def test_the_last_line_of_metrics_may_be_cut(command: Command, run: Path) -> None:
    """A process that was killed while it wrote has not damaged its run."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines, lines[-1][:20]]))
    outcome = command("train", f"resume={run}", "total_transitions=320")
    assert outcome.code == 0, outcome.err
    written = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert written[-1]["transitions"] == 320


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ("hidden:\n  - 8\n", "hidden:\n  - 8\n  - 8\n", "network.hidden is [8, 8]"),
        ("tasks: []\n", "tasks: [normal_left]\n", "env.tasks is ['normal_left']"),
        ("gae_lambda: 0.95\n", "gae_lambda: 0.5\n", "algorithm.gae_lambda is 0.5"),
    ],
)
@pytest.mark.parametrize("knows", [True, False])
def test_an_edited_configuration(
    command: Command, run: Path, before: str, after: str, key: str, knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a checkpoint was made with is known; one of former versions is at least found not to fit."""
    path = run / "config.yaml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    if not knows:
        if "lambda" in key:
            pytest.skip("that fits any checkpoint")
        monkeypatch.setattr("varshare_rl.assemble.check_unchanged", lambda *_: None)
        monkeypatch.setattr("varshare_rl.commands.train.check_unchanged", lambda *_: None)
        key = "does not fit its config.yaml"
    unchanged = snapshot(run)
    for outcome in (command("train", f"resume={run}", "total_transitions=320"), command("evaluate", f"run={run}")):
        assert_one_line(outcome.code, outcome.err, key)
    assert {name: data for name, data in snapshot(run).items() if "tfevents" not in name} == {
        name: data for name, data in unchanged.items() if "tfevents" not in name
    }


def test_a_folder_that_another_process_trains_in(command: Command, run: Path) -> None:
    with held_folder(run):
        before = snapshot(run)
        outcome = command("train", f"resume={run}", "total_transitions=320")
        assert_one_line(outcome.code, outcome.err, f"in use by process {os.getpid()} on {socket.gethostname()}")
        assert snapshot(run) == before
        assert command("evaluate", f"run={run}", "episodes=1", "device=cpu").code == 0
