"""2N updates are N, save, load and N more, bit for bit; and a signal is a save."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM

import varshare_rl as vs
from varshare_rl.run.checkpoint import find_checkpoint, load_checkpoint
from varshare_rl.run.loop import Run

METAWORLD = (
    "env=mt1", "env.tasks=[reach-v3]", "env.horizon=30", "env.workers=1", "env.goals_per_task=3",
    "env.envs_per_task=2",
)  # fmt: skip


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """Equal in type and every bit."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, theirs, f"{place}.{index}")
    elif isinstance(one, torch.Tensor | np.ndarray):
        assert one.dtype == other.dtype, place
        assert np.array_equal(np.asarray(one), np.asarray(other)), place
    else:
        assert one == other, place


def final_state(run: Path) -> dict[str, Any]:
    """The last checkpoint without what the clock decides."""
    state = load_checkpoint(find_checkpoint(run))
    return {key: value for key, value in state.items() if "seconds" not in key}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "time/transitions_per_second", "time/share_")
    return [{key: value for key, value in line.items() if not key.startswith(clock)} for line in lines]


def results(run: Path) -> dict[str, Any]:
    """``summary.json`` without what the clock decides."""
    summary = json.loads((run / "summary.json").read_text())
    return {key: value for key, value in summary.items() if "second" not in key}


def observations(run: Path) -> dict[str, str]:
    """What ``sharing`` holds, by file name."""
    return {path.name: path.read_text() for path in (run / "sharing").iterdir()}


ABSORBING = ("elbo.absorb.rate=0.5", "elbo.absorb.max_error=9")

CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    # transitions at which the first half ends: 33 vector steps; episodes are 40 long, PPO's rollouts 20 steps
    "ppo": (528, (*TINY, *TINY_ALGORITHM["ppo"])),
    "sac": (528, (*TINY, *TINY_ALGORITHM["sac"])),
    "ppo_absorbing": (
        528,
        (*TINY, *TINY_ALGORITHM["ppo"], *ABSORBING, "elbo.absorb.every=4"),
    ),
    "sac_absorbing": (
        528,
        (*TINY, *TINY_ALGORITHM["sac"], *ABSORBING, "elbo.absorb.every=3"),
    ),
    "ppo_ivon": (528, (*TINY, *TINY_ALGORITHM["ppo"], "optimizer.posteriors=ivon")),
    "sac_ivon_few_tasks": (
        528, (*TINY, *TINY_ALGORITHM["sac"], "optimizer.posteriors=ivon", "algorithm.tasks_per_update=3"),
    ),
    "sac_normalised_full_rank": (
        528,
        (
            *TINY, *TINY_ALGORITHM["sac"], "network=varshare", "algorithm.normalize_observations=true",
            "algorithm.reward_scale=return_std", "algorithm.updates_per_transition_per_task=0.15",
        ),
    ),
    "sac_moore_matched": (
        528, (*TINY, *TINY_ALGORITHM["sac"], "network=moore", "network.active_parameters=5000"),
    ),
    "ppo_discrete": (33 * 12, (*TINY, *TINY_ALGORITHM["ppo"], "env=cartpole", "env.horizon=40")),
    "ppo_correlated_noise": (528, (*TINY, *TINY_ALGORITHM["ppo"], "algorithm.noise_correlation=0.7")),
    "sac_correlated_noise": (528, (*TINY, *TINY_ALGORITHM["sac"], "algorithm.noise_correlation=0.7")),
    "ppo_draws_per_episode": (
        528,
        (
            *TINY, *TINY_ALGORITHM["ppo"], "elbo.draw.acting=per_episode", "elbo.draw.evaluation=per_episode",
            "elbo/schedule=band", "elbo.schedule.interval=2", "elbo/prior=adaptive", "elbo.prior.interval=2",
        ),
    ),
    "ppo_draws_per_step": (
        528,
        (
            *TINY, *TINY_ALGORITHM["ppo"], "elbo.draw.acting=per_step", "elbo.draw.targets=sample",
            "elbo/schedule=dual", "elbo/prior=learned", "elbo.prior.interval=2", "elbo.estimator=local",
        ),
    ),
    "sac_draws_per_episode": (
        528,
        (
            *TINY, *TINY_ALGORITHM["sac"], "elbo.draw.acting=per_episode", "elbo.draw.targets=sample",
            "elbo/schedule=dual", "elbo/prior=adaptive", "elbo.prior.interval=2", "elbo.estimator=flipout",
            "overlap=true",
        ),
    ),
    "ppo_desired_kl": (528, (*TINY, *TINY_ALGORITHM["ppo"], "algorithm.desired_kl=1e-4")),
    "ppo_overlap": (528, (*TINY, *TINY_ALGORITHM["ppo"], "overlap=true")),
    "ppo_clipped": (
        528,
        (
            *TINY, *TINY_ALGORITHM["ppo"], "algorithm.policy=clipped_gaussian", "algorithm.log_std=parameter",
            "algorithm.initial_log_std=-0.5", "algorithm.max_log_std=0", "algorithm.min_observation_std=0.05",
            "algorithm.value_clip=0.2", "algorithm.advantage_scale=rollout", "network.initialization=orthogonal",
            "network.output_gain=0.01", "critic.output_gain=1",
        ),
    ),
    "ppo_critic_kit": (
        528,
        (*TINY, *TINY_ALGORITHM["ppo"], "critic=popart", "critic.blocks=bronet", "algorithm.reward_scale=ars"),
    ),
    "sac_critic_kit": (
        528,
        (*TINY, *TINY_ALGORITHM["sac"], "critic=popart", "critic.layer_norm=true", "algorithm.reward_scale=ars"),
    ),
    "sac_a_few_tasks_at_a_time": (
        528,
        (
            *TINY, *TINY_ALGORITHM["sac"], *ABSORBING, "elbo.absorb.every=3", "algorithm.tasks_per_update=3",
            "critic=popart", "elbo/schedule=band", "observe.every=300",
        ),
    ),
    "sac_categorical": (
        528,
        (*TINY, *TINY_ALGORITHM["sac"], "critic=brc", "critic.hidden=[8,8]", "network=shared"),
    ),
    "ppo_metaworld": (66, (*TINY, *METAWORLD, *TINY_ALGORITHM["ppo"])),
    "sac_metaworld": (66, (*TINY, *METAWORLD, *TINY_ALGORITHM["sac"])),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_two_halves_are_one_whole(command: Command, folder: Path, name: str) -> None:
    half, overrides = CASES[name]
    each = {"log.every": half // 11, "evaluate.every": half, "observe.every": half // 3}
    overrides = (*overrides, *(f"{key}={value}" for key, value in each.items()))
    whole = command("train", *overrides, f"total_transitions={2 * half}", "run_dir=whole")
    assert whole.code == 0, whole.err
    first = command("train", *overrides, f"total_transitions={half}", "run_dir=halves")
    assert first.code == 0, first.err
    middle = final_state(Path("halves"))
    assert middle["transitions"] == half
    assert middle["updates"] > 0
    assert middle["episodes"]["running_steps"].any()  # in the middle of episodes ...
    if "ppo" in name:
        assert middle["algorithm"]["rollout"]["position"] == 13  # ... and of a rollout
    torch.manual_seed(99)  # nothing may depend on the state of this process
    np.random.seed(99)  # noqa: NPY002
    second = command("train", "resume=halves", f"total_transitions={2 * half}")
    assert second.code == 0, second.err
    last = final_state(Path("whole"))
    assert last["updates"] > middle["updates"]
    assert_same(final_state(Path("halves")), last)
    assert metrics(Path("halves")) == metrics(Path("whole"))
    assert observations(Path("halves")) == observations(Path("whole")) != {}
    assert_same(results(Path("halves")), results(Path("whole")))
    assert find_checkpoint(Path("halves"), "best").name == find_checkpoint(Path("whole"), "best").name


def launch(folder: Path, run_dir: str, *arguments: str, beyond: int = 0) -> subprocess.Popen[str]:
    """The training command in a process of its own, once it has logged an update later than ``beyond``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "varshare_rl.train", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "60"},
    )
    deadline = time.monotonic() + 120
    path = folder / run_dir / "metrics.jsonl"
    while True:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        if any("loss/" in line and json.loads(line)["transitions"] > beyond for line in lines):
            return process
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.005)


def start(folder: Path, run_dir: str, *overrides: str) -> subprocess.Popen[str]:
    """A new run that has made its first updates."""
    return launch(folder, run_dir, *overrides, f"run_dir='{run_dir}'")


@pytest.mark.parametrize(
    ("number", "algorithm", "total"),
    [(signal.SIGTERM, "ppo", 24_000), pytest.param(signal.SIGINT, "sac", 6_000, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_says_how_to_go_on(
    command: Command, folder: Path, number: signal.Signals, algorithm: str, total: int
) -> None:
    overrides = (*TINY, *TINY_ALGORITHM[algorithm], f"total_transitions={total}")
    process = start(folder, "run", *overrides)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == ""
    assert number.name in out
    (line,) = re.findall(r"python -m varshare_rl\.train resume=.*", out)
    stopped = load_checkpoint(find_checkpoint(folder / "run"))["transitions"]
    assert 0 < stopped < total
    assert not (folder / "run" / "summary.json").exists()

    arguments = shlex.split(line)[3:]
    assert arguments == ["resume=run"]
    resumed = command("train", *arguments)
    assert resumed.code == 0, resumed.err
    whole = command("train", *overrides, "run_dir=whole")
    assert whole.code == 0, whole.err
    assert_same(final_state(folder / "run"), final_state(folder / "whole"))
    assert metrics(folder / "run") == metrics(folder / "whole")
    assert results(folder / "run") == results(folder / "whole")


def test_the_resume_command_survives_a_long_path(folder: Path) -> None:
    """It is one line that a shell understands, whatever the width of the screen."""
    name = "a folder with spaces and a name " + "that is too long " * 10
    overrides = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=1000000")
    process = start(folder, name.strip(), *overrides)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    (line,) = re.findall(r"python -m varshare_rl\.train .*", out)
    done = subprocess.run(
        [sys.executable, *shlex.split(line)[1:], "total_transitions=0"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "total_transitions is 0" in done.stderr, done.stderr  # it found the run and read its configuration


def test_a_run_that_was_stopped_before_its_results_still_gets_them(command: Command) -> None:
    """All transitions done, then killed while it evaluated."""
    overrides = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=160")
    assert command("train", *overrides, "run_dir=run").code == 0
    expected = results(Path("run"))
    Path("run/summary.json").unlink()
    outcome = command("train", "resume=run")
    assert outcome.code == 0, outcome.err
    assert results(Path("run")) == expected


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(command: Command) -> None:
    """To the same numbers, in every file, as if nothing had happened."""
    overrides = (*TINY, *TINY_ALGORITHM["sac"], "checkpoint.every=160", "log.every=40", "evaluate.every=160")
    assert command("train", *overrides, "total_transitions=480", "run_dir=whole").code == 0
    assert command("train", *overrides, "total_transitions=320", "run_dir=hurt").code == 0
    (newest, before) = (Path("hurt/checkpoints") / f"last-{number:012d}" for number in (320, 160))
    assert before.is_dir()
    (newest / "tensors.safetensors").write_bytes(b"x" * (newest / "tensors.safetensors").stat().st_size)
    resumed = command("train", "resume=hurt", "total_transitions=480")
    assert resumed.code == 0
    assert "going on from the one before, last-000000000160" in resumed.err
    assert_same(final_state(Path("hurt")), final_state(Path("whole")))
    assert metrics(Path("hurt")) == metrics(Path("whole"))
    assert_same(results(Path("hurt")), results(Path("whole")))


def test_a_larger_budget_is_remembered(command: Command, folder: Path) -> None:
    """A finished run goes on with more, is stopped, and goes on by the printed command alone."""
    overrides = (*TINY, *TINY_ALGORITHM["ppo"])
    assert command("train", *overrides, "total_transitions=160", "run_dir=run").code == 0
    process = launch(folder, "run", "resume=run", "total_transitions=24000", beyond=160)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert not (folder / "run" / "summary.json").exists()  # that of the smaller budget is gone
    (line,) = re.findall(r"python -m varshare_rl\.train resume=.*", out)
    resumed = command("train", *shlex.split(line)[3:])
    assert resumed.code == 0, resumed.err
    assert json.loads((folder / "run" / "summary.json").read_text())["transitions"] == 24_000


def test_a_second_run_with_the_same_seed_is_the_same(command: Command) -> None:
    overrides = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=480")
    for name, seed in (("one", 3), ("other", 3), ("third", 4)):
        assert command("train", *overrides, f"seed={seed}", f"run_dir={name}").code == 0
    assert_same(final_state(Path("one")), final_state(Path("other")))
    with pytest.raises(AssertionError):
        assert_same(final_state(Path("one"))["algorithm"], final_state(Path("third"))["algorithm"])


def test_what_may_change_does_not_change_the_learning(command: Command) -> None:
    """Evaluating, logging, observing and saving more often leaves the training as it is."""
    overrides = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=960")
    often = (
        "evaluate.every=160", "evaluate.episodes=3", "log.every=16", "checkpoint.every=16", "observe.every=160",
    )  # fmt: skip
    assert command("train", *overrides, "run_dir=seldom").code == 0
    assert command("train", *overrides, *often, "run_dir=often").code == 0
    one, other = final_state(Path("seldom")), final_state(Path("often"))
    assert_same(one["algorithm"], other["algorithm"])
    assert_same(one["random"], other["random"])
    assert len(list(Path("often/checkpoints").glob("last-*"))) == 2


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_a_run_with_resets_is_stopped_and_goes_on_bit_for_bit(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """Its budget is the same in both halves, as resets come at shares of it."""
    total, half = 1056, 528
    overrides = (
        *TINY, *TINY_ALGORITHM[algorithm], "critic=popart", "algorithm.resets=4", f"total_transitions={total}",
        "algorithm.reward_scale=ars",
    )  # fmt: skip
    assert command("train", *overrides, "run_dir=whole").code == 0
    with monkeypatch.context() as patched:
        plain = Run._after_step

        def stopping(run: Run) -> None:
            plain(run)
            if run.transitions == half:
                os.kill(os.getpid(), signal.SIGTERM)

        patched.setattr(Run, "_after_step", stopping)
        assert command("train", *overrides, "run_dir=halves").code == 128 + signal.SIGTERM
    middle = final_state(Path("halves"))
    assert middle["transitions"] == half
    assert middle["algorithm"]["resets_done"] in (1, 2)  # PPO resets between its rollouts
    assert command("train", "resume=halves").code == 0
    assert_same(final_state(Path("halves")), final_state(Path("whole")))
    assert final_state(Path("whole"))["algorithm"]["resets_done"] == 4


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every save of a run: its kind, and the transitions."""
    made: list[tuple[str, int]] = []
    plain = Run.save

    def save(run: Run, kind: str) -> Path:
        made.append((kind, run.transitions))
        return plain(run, kind)

    monkeypatch.setattr(Run, "save", save)
    return made


def test_there_is_a_checkpoint_at_the_start_and_by_time(
    command: Command, saves: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        """Ten seconds pass with every vector step."""

        @staticmethod
        def monotonic() -> float:
            return 10.0 * steps[0]

        perf_counter = time.perf_counter

    steps = [0]
    plain = Run._vector_step

    def step(run: Run, obs: torch.Tensor) -> torch.Tensor:
        steps[0] += 1
        return plain(run, obs)

    monkeypatch.setattr(Run, "_vector_step", step)
    monkeypatch.setattr("varshare_rl.run.loop.time", Clock)
    assert command("train", *TINY, *TINY_ALGORITHM["ppo"], "total_transitions=480", "run_dir=run").code == 0
    # by default every two minutes, which are 12 steps of 16 transitions
    assert [at for kind, at in saves if kind == "last"] == [0, 192, 384, 480]
    saves.clear()
    quick = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=480", "checkpoint.minutes=0", "run_dir=other")
    assert command("train", *quick).code == 0
    assert [at for kind, at in saves if kind == "last"] == [0, 480]
    assert_same(final_state(Path("run"))["algorithm"], final_state(Path("other"))["algorithm"])


def test_saving_takes_a_twentieth_of_the_time_at_most(command: Command, saves: list[tuple[str, int]]) -> None:
    """A save that took half a minute is followed by ten without one."""
    found: list[bool] = []
    plain = Run._after_step

    def ask(run: Run) -> None:
        for seconds in (590.0, 610.0):
            run._saved_at, run._save_seconds = time.monotonic() - seconds, 30.0
            found.append(run._due_by_time())
        plain(run)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "_after_step", ask)
        options = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=16", "run_dir=run")
        assert command("train", *options).code == 0
    assert found == [False, True]


def test_a_run_that_is_killed_before_its_first_step_goes_on(command: Command) -> None:
    overrides = (*TINY, *TINY_ALGORITHM["sac"], "total_transitions=320")
    with pytest.MonkeyPatch.context() as patched:

        def die(run: Run, obs: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError

        patched.setattr(Run, "_vector_step", die)
        with pytest.raises(ZeroDivisionError):
            command("train", *overrides, "run_dir=run")
    assert command("train", "resume=run").code == 0
    assert command("train", *overrides, "run_dir=whole").code == 0
    assert_same(final_state(Path("run")), final_state(Path("whole")))
    assert metrics(Path("run")) == metrics(Path("whole"))


class Weather(gymnasium.Env[Any, Any]):
    """Episodes of ten steps whose rewards follow no seed."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.zeros(1, np.float32), float(np.random.default_rng().random()), False, self.steps == 10, {}


def test_an_episode_that_cannot_be_played_again_is_cut_off(folder: Path) -> None:
    options: dict[str, Any] = {
        "algorithm": {"rollout_transitions_per_task": 40, "epochs": 1, "minibatches": 1},
        "env": {"envs_per_task": 2, "horizon": 10}, "network": {"hidden": [8]},
        "evaluate": {"episodes": 1, "every": 0}, "log": {"quiet": True, "every": 8}, "device": "cpu",
    }  # fmt: skip
    envs = {"one": Weather, "two": Weather}
    vs.train(envs=envs, total_transitions=68, run_dir="run", **options)  # seven steps into the second episodes
    vs.train(resume="run", envs=envs, total_transitions=400)
    found = [
        line["train/mean_episode_steps"] for line in metrics(Path("run")) if "train/mean_episode_steps" in line
    ]
    assert len(found) > 20
    assert set(found) == {10.0}
