"""A run that begins with the last checkpoint of another: the same numbers without a change, others with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM
from omegaconf import OmegaConf
from test_resume import assert_same, final_state, metrics

import varshare_rl as vs

#: Transitions of the run that others begin with: in the middle of episodes and of a rollout.
HALF = 528


def trained(command: Command, algorithm: str, *overrides: str) -> dict[Path, bytes]:
    """Train ``one``; returns its files."""
    given = (*TINY, *TINY_ALGORITHM[algorithm], "evaluate.every=160", *overrides)
    outcome = command("train", *given, f"total_transitions={HALF}", "run_dir=one")
    assert outcome.code == 0, outcome.err
    return {path: path.read_bytes() for path in Path("one").rglob("*") if path.is_file()}


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_without_a_change_it_does_what_a_resumed_run_does(command: Command, algorithm: str) -> None:
    before = trained(command, algorithm)
    outcome = command("train", "from=one", f"total_transitions={2 * HALF}", "run_dir=two")
    assert outcome.code == 0, outcome.err
    assert {path: path.read_bytes() for path in before} == before
    assert command("train", "resume=one", f"total_transitions={2 * HALF}").code == 0
    resumed, branch = final_state(Path("one")), final_state(Path("two"))
    for state in (resumed, branch):
        state.pop("options"), state.pop("best_score")  # the branch's best is its own
    assert_same(branch, resumed)
    first = metrics(Path("two"))[0]
    assert first["transitions"] == HALF
    assert "eval/mean_success" in first
    config, summary = OmegaConf.load("two/config.yaml"), json.loads(Path("two/summary.json").read_text())
    assert config.pretrained == summary["conditions"]["from"] == "one"
    assert summary["transitions"] == 2 * HALF
    assert list(Path("two/checkpoints").glob("best-*"))


def weights(run: str) -> dict[str, torch.Tensor]:
    """Everything that gradients change in the policy of a run's last checkpoint."""
    actor = final_state(Path(run))["algorithm"]["actor"]
    return {name: value for name, value in actor.items() if value.is_floating_point()}


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_a_rate_that_is_given_anew_is_that_of_every_parameter(command: Command, algorithm: str) -> None:
    trained(command, algorithm)
    total = f"total_transitions={2 * HALF}"
    assert command("train", "from=one", total, "run_dir=same").code == 0
    assert command("train", "from=one", total, "algorithm.learning_rate=1e-12", "run_dir=still").code == 0
    before, same, still = weights("one"), weights("same"), weights("still")
    assert all(torch.allclose(still[name], before[name], rtol=0, atol=1e-8) for name in before)
    moved = [name for name in before if not torch.allclose(same[name], before[name], rtol=0, atol=1e-4)]
    assert any("rho" in name for name in moved)
    assert any("theta" in name for name in moved)


def test_a_weight_of_the_divergence_that_is_given_anew_is_the_one_that_holds(command: Command) -> None:
    trained(command, "ppo")
    given = ("from=one", f"total_transitions={2 * HALF}", "elbo.kl_weight=0.7", "run_dir=two")
    assert command("train", *given).code == 0
    weights = {line["elbo/kl_weight"] for line in metrics(Path("two")) if "elbo/kl_weight" in line}
    assert weights == {0.7}


def test_training_episodes_may_become_shorter(command: Command) -> None:
    given = ("env=metaworld", "env.tasks=[reach-v3]", "env.horizon=30", "env.workers=1", "env.goals_per_task=2")
    more = ("network.hidden=[8]", "evaluate.episodes=2", "log.every=32", "log.trackers=[]", "device=cpu")
    more = (*TINY_ALGORITHM["ppo"], *more)
    assert command("train", *given, *more, "total_transitions=48", "run_dir=one").code == 0
    outcome = command("train", "from=one", "total_transitions=320", "env.training_horizon=5", "run_dir=two")
    assert outcome.code == 0, outcome.err  # longer episodes are under way by then
    lines = metrics(Path("two"))
    assert [x["train/mean_episode_steps"] for x in lines if "train/mean_episode_steps" in x][-1] == 5.0
    assert {x["eval/mean_episode_steps"] for x in lines if "eval/mean_episode_steps" in x} == {30.0}


def test_it_is_resumed_as_any_run(command: Command) -> None:
    trained(command, "ppo")
    given = ("from=one", "algorithm.entropy_weight=0.1", "optimizer.schedule=linear")
    assert command("train", *given, "total_transitions=1056", "run_dir=whole").code == 0
    assert command("train", *given, "total_transitions=800", "run_dir=two").code == 0
    Path("two/config.yaml").write_text(
        Path("two/config.yaml").read_text().replace("total_transitions: 800", "total_transitions: 1056")
    )
    outcome = command("train", "resume=two")
    assert outcome.code == 0, outcome.err
    assert final_state(Path("two"))["transitions"] == final_state(Path("whole"))["transitions"] == 1056
    assert OmegaConf.load("two/config.yaml").algorithm.entropy_weight == 0.1


def test_a_sweep_branches_and_is_done_when_it_is_given_again(command: Command) -> None:
    trained(command, "ppo")
    words = ("-m", "from=one", "total_transitions=1e3", "elbo.temperature=0,1", "hydra.sweep.dir=swept")
    outcome = command("train", *words)
    assert outcome.code == 0, outcome.err
    found = {path.name: OmegaConf.load(path / "config.yaml") for path in Path("swept").glob("temperature*")}
    assert {name: config.elbo.temperature for name, config in found.items()} == {
        "temperature-0": 0.0,
        "temperature-1": 1.0,
    }
    assert {config.total_transitions for config in found.values()} == {1000}
    again = command("train", *words)
    assert "2 done already" in again.out
    outcome = command("train", *words, "hydra/launcher=joblib")
    assert outcome.code == 2
    assert "one after another" in outcome.err


def test_a_bound_of_the_spread_is_that_of_a_run_in_which_it_rises(command: Command) -> None:
    """40 transitions of each task are a rollout; the bound of the one run rises where the other begins."""
    words = (*TINY, *TINY_ALGORITHM["ppo"], "algorithm.initial_log_std=-2")
    assert command("train", *words, "total_transitions=640", "run_dir=one").code == 0
    bound, total = "algorithm.min_log_std=-0.7", "total_transitions=1120"
    outcome = command("train", "from=one", bound, total, "run_dir=two")
    assert outcome.code == 0, outcome.err
    after = "algorithm.min_log_std_after=80"
    outcome = command("train", *words, bound, after, total, "run_dir=three")
    assert outcome.code == 0, outcome.err
    assert command("train", *words, total, "run_dir=never").code == 0
    halved = (*words, bound, after, "run_dir=halves")
    assert command("train", *halved, "total_transitions=528").code == 0  # in the middle of a rollout
    assert command("train", "resume=halves", total).code == 0
    states = {name: final_state(Path(name)) for name in ("two", "three", "never", "halves")}
    for state in states.values():
        state.pop("options"), state.pop("best_score")
    assert_same(states["two"], states["three"])
    assert_same(states["halves"], states["three"])
    assert states["three"]["algorithm"]["least_log_std"] == -0.7
    assert not torch.equal(weights("never")["network.layers.0.theta"], weights("three")["network.layers.0.theta"])


def test_noise_may_begin_to_go_on(command: Command) -> None:
    """What white noise had nothing to keep of."""
    trained(command, "ppo")
    for correlation in ("0.5", "0"):
        given = (f"algorithm.noise_correlation={correlation}", f"run_dir={correlation}")
        outcome = command("train", "from=one", "total_transitions=1056", *given)
        assert outcome.code == 0, outcome.err
    assert final_state(Path("0.5"))["algorithm"]["action_noise"]["value"].abs().max() > 0


def test_from_python(command: Command) -> None:
    trained(command, "ppo")
    agent = vs.train("from=one", total_transitions=800, run_dir="two", algorithm={"clip": 0.1})
    assert agent.config.algorithm.clip == 0.1
    assert agent.results["transitions"] == 800


def test_from_environments_that_are_python_objects(folder: Path) -> None:
    def make() -> gymnasium.Env[Any, Any]:
        return gymnasium.make("CartPole-v1")

    tiny = {"rollout_transitions_per_task": 40, "epochs": 2, "minibatches": 2}
    given: dict[str, Any] = {
        "env": {"envs_per_task": 2}, "network": {"hidden": [8]}, "evaluate": {"episodes": 1, "every": 0},
        "log": {"quiet": True},
    }  # fmt: skip
    vs.train(envs={"one": make, "two": make}, algorithm=tiny, total_transitions=160, run_dir="one", **given)
    agent = vs.train("from=one", envs={"one": make, "two": make}, total_transitions=320, run_dir="two")
    assert agent.results["transitions"] == 320
    with pytest.raises(vs.UserError, match="Python objects"):
        vs.train("from=one", total_transitions=320, run_dir="three")


REFUSED = {
    "nothing left to do": ((), "from=one has done 528 transitions already"),
    "another suite": (("env=cartpole",), "env=cartpole cannot be given with from=one"),
    "another network": (("network=lora",), "network=lora cannot be given"),
    "an option of the suite": (("env.horizon=3",), "env.horizon=3 cannot be given"),
    "a recipe": (("+experiment=toppo_mt10",), "+experiment=toppo_mt10 cannot be given"),
    "another seed": (("seed=1",), "seed=1 cannot be given"),
    "statistics": (("algorithm.normalize_observations=false",), "algorithm.normalize_observations=false cannot"),
    "a rollout that is full already": (
        ("algorithm.rollout_transitions_per_task=2",),
        "cannot be given with from=one",
    ),
    "another replay": (("algorithm.replay_capacity_per_task=7",), "cannot be given with from=one"),
    "another aggregator": (("gradient.actor=pcgrad",), "gradient.actor=pcgrad cannot be given with from=one"),
    "no option": (("algorithm.foo=1",), "Key 'foo' not in 'PPOConfig'"),
    "no number": (("algorithm.clip=wide",), "could not be converted to Float"),
    "out of bounds": (("algorithm.discount=2",), "algorithm.discount is 2"),
    "several values": (("algorithm.epochs=1,2",), "-m makes a run of each"),
    "no run": (("from=nowhere",), "no run folder nowhere, which from= begins with"),
    "the folder of that run": (
        ("run_dir=one", "overwrite=true"),
        "run_dir=one is the run that this one begins with",
    ),
    "a command that shows": (("--cfg", "job"), "--cfg shows what is composed here"),
    "resumed at once": (("resume=one",), "from=one begins a new run, and resume=one goes on with one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_checkpoint_is_made_of_is_refused_in_one_line(command: Command, case: str) -> None:
    before = trained(command, "ppo")
    given, expected = REFUSED[case]
    more = () if case == "nothing left to do" else ("total_transitions=1056",)
    outcome = command("train", "from=one", *more, "run_dir=two", *given)
    assert outcome.code == 2
    assert expected in outcome.err, outcome.err
    assert outcome.err.count("\n") == 1
    assert not Path("two").exists()
    assert {path: path.read_bytes() for path in before} == before
