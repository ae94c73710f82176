"""Ranks train one agent together: as one process would, and as well as one survives what happens to it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from forks import run_ranks
from helpers import TINY, TINY_ALGORITHM, last_of_each
from test_resume import CASES, assert_same, final_state, metrics, results

from varshare_rl.commands import train
from varshare_rl.entry import start
from varshare_rl.envs.cartpole import CartPoleConfig, CartPoleSuite
from varshare_rl.envs.division import part_of
from varshare_rl.envs.engine import SlotEngine
from varshare_rl.envs.gymnasium_suite import GymnasiumConfig
from varshare_rl.envs.pointmass import PointMassConfig, PointMassSuite
from varshare_rl.envs.slots import EnvironmentFailure, Slot
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import UserError
from varshare_rl.run import checkpoint
from varshare_rl.run.checkpoint import find_checkpoint, load_checkpoint
from varshare_rl.run.loop import Run

PLAIN = ("log.trackers=[]", "env.envs_per_task=4")
PPO = last_of_each((*TINY, *TINY_ALGORITHM["ppo"], *PLAIN, "total_transitions=4160"))
SAC = last_of_each((*TINY, *TINY_ALGORITHM["sac"], *PLAIN, "total_transitions=2080"))


def assert_close(one: Any, other: Any, place: str = "", tolerance: float = 1e-5) -> None:
    """Equal but for the order of sums: within ``tolerance`` of 1, or of the largest entry."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_close(one[key], other[key], f"{place}.{key}", tolerance)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_close(mine, theirs, f"{place}.{index}", tolerance)
    elif isinstance(one, torch.Tensor | np.ndarray | float):
        mine, theirs = (np.asarray(value, dtype=np.float64) for value in (one, other))
        assert mine.shape == theirs.shape, place
        scale = max(1.0, float(np.abs(mine).max())) if mine.size else 1.0
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * scale, err_msg=place)
    else:
        assert one == other, place


def learnt(run: Path) -> dict[str, Any]:
    """What has been learnt, without what ranks have of their own."""
    state = final_state(run)["algorithm"]
    return {key: value for key, value in state.items() if key != "replay"}


def each_of(lines: list[list[str]]) -> Callable[[], None]:
    """Train with several command lines, one after the other."""

    def main() -> None:
        for line in lines:
            sys.argv[1:] = line
            train.command()

    return main


def train_twice(command: Command, cases: dict[str, list[str]]) -> None:
    """Make every run in one process and by two ranks."""
    lines = [[*overrides, f"run_dir=two/{name}"] for name, overrides in cases.items()]
    for rank in run_ranks(main=each_of(lines)):
        assert rank.code == 0, rank.err
        assert rank.err == ""
    for name, overrides in cases.items():
        outcome = command("train", *overrides, f"run_dir=one/{name}")
        assert outcome.code == 0, outcome.err


def assert_alike(folder: Path, name: str, tolerance: float = 1e-5) -> None:
    one, two = folder / "one" / name, folder / "two" / name
    assert_close(learnt(one), learnt(two), name, tolerance)
    assert_close(metrics(one), metrics(two), name, 10 * tolerance)
    mine, theirs = results(one), results(two)
    assert theirs.pop("conditions")["ranks"] == 2
    assert "ranks" not in mine.pop("conditions")
    assert_close(mine, theirs, name, 10 * tolerance)


def test_two_ranks_learn_what_one_process_does(command: Command, folder: Path) -> None:
    cases = {"ppo": PPO, "sac": SAC}
    train_twice(command, cases)
    for name in cases:
        assert load_checkpoint(find_checkpoint(folder / "two" / name))["updates"] >= 50
        assert_alike(folder, name)
    held = [
        len(load_checkpoint(path)["algorithm"]["replay"]["rows"][0])
        for path in (find_checkpoint(folder / "two" / "sac"), find_checkpoint(folder / "two" / "sac") / "rank-1")
    ]
    assert held == [50, 50]  # of 100 transitions of a task


EXTRA = {
    "ppo_pcgrad": (*TINY, *TINY_ALGORITHM["ppo"], "gradient=pcgrad"),
    "sac_gradnorm": (*TINY, *TINY_ALGORITHM["sac"], "gradient=gradnorm"),
    "sac_temperature": (*TINY, *TINY_ALGORITHM["sac"], "gradient=softmax_temperature"),
    "ppo_few_tasks_per_rank": (*TINY, *TINY_ALGORITHM["ppo"], "tasks_per_rank=4", "env.envs_per_task=1"),
    "ppo_discrete_tasks_per_rank": (*TINY, *TINY_ALGORITHM["ppo"], "env=cartpole", "tasks_per_rank=3"),
    "sac_few_tasks_per_rank": (*TINY, *TINY_ALGORITHM["sac"], "tasks_per_rank=7", "overlap=true"),
    "ppo_stops_early": (*TINY, *TINY_ALGORITHM["ppo"], "algorithm.target_kl=1e-5", "observe.every=400"),
    "ppo_resets": (*TINY, *TINY_ALGORITHM["ppo"], "algorithm.resets=2", "optimizer.schedule=cosine"),
}


#: Runs that amplify the order of sums: a truncated factorisation has no unique factors, a median picks a task.
LOOSE = {"sac_absorbing": 0.2, "sac_a_few_tasks_at_a_time": 0.2, "ppo_draws_per_episode": 1e-2}
KINDS = {name: overrides for name, (_, overrides) in CASES.items() if "metaworld" not in name} | EXTRA


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_run_learns_what_one_process_does(command: Command, folder: Path, name: str) -> None:
    run = last_of_each((*KINDS[name], "log.trackers=[]", "total_transitions=1056", "evaluate.every=528"))
    train_twice(command, {name: run})
    assert_alike(folder, name, LOOSE.get(name, 1e-4))


FAULTS = last_of_each((
    *TINY, *TINY_ALGORITHM["sac"], *PLAIN, "env=gymnasium", "env.ids=[Pendulum-v1,Pendulum-v1]", "env.horizon=30",
    "env.workers=1", "log.every=80", "evaluate.every=160", "evaluate.episodes=1", "checkpoint.every=80",
    "total_transitions=320", "checkpoint.minutes=0", "observe.every=0",
))  # fmt: skip


def at(owner: Any, method: str, calls: int, strike: Callable[[], None], rank: int = 1) -> Callable[[int], None]:
    """Strike one rank when it calls a method for the so manieth time."""

    def before(own: int) -> None:
        if own != rank:
            return
        plain, left = getattr(owner, method), calls

        def struck(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                strike()
            return plain(*arguments, **options)

        setattr(owner, method, struck)

    return before


def own(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def assert_same_run(one: Path, other: Path) -> None:
    """To the bit, in what every rank has."""
    mine, theirs = find_checkpoint(one), find_checkpoint(other)
    assert mine.name == theirs.name
    assert_same(final_state(one), final_state(other))
    assert_same(load_checkpoint(mine / "rank-1"), load_checkpoint(theirs / "rank-1"))
    assert metrics(one) == metrics(other)
    assert results(one) == results(other)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing has happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with chdir(folder):
        for rank in run_ranks(*FAULTS, "run_dir=whole"):
            assert rank.code == 0, rank.err
    return folder / "whole"


@pytest.fixture
def whole(undisturbed: Path, folder: Path) -> Path:
    """A copy of it."""
    shutil.copytree(undisturbed, folder / "whole")
    return folder / "whole"


def go_on_and_compare(name: str, whole: Path) -> None:
    for rank in run_ranks(f"resume={name}"):
        assert rank.code == 0, rank.err
    assert_same_run(whole.parent / name, whole)


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_all_in_one_line_and_what_goes_on_is_the_same(whole: Path, killed: int) -> None:
    struck = at(checkpoint, "_write", 4, own(signal.SIGKILL), killed)
    ended = run_ranks(*FAULTS, "run_dir=run", before=struck)
    left = ended[1 - killed]
    assert (ended[killed].code, left.code) == (-9, 1)
    line = left.err.splitlines()[-1]  # forks cannot silence the warnings of PyTorch, which the test has imported
    assert line.startswith("error: another rank of the 2 has ended or does not answer (")
    command = "torchrun --nproc-per-node 2 -m varshare_rl.train resume=run"
    assert line.endswith(f"go on from the last checkpoint with {command}")
    go_on_and_compare("run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_saves_what_all_have(whole: Path, rank: int) -> None:
    ended = run_ranks(*FAULTS, "run_dir=run", before=at(SlotEngine, "finish", 20, own(signal.SIGTERM), rank))
    assert [rank.code for rank in ended] == [143, 143], ended[0].err + ended[1].err
    assert ended[0].err == ended[1].err == ended[1].out == ""
    assert "all saved; go on with:\n    torchrun --nproc-per-node 2 -m varshare_rl.train resume=run" in ended[0].out
    go_on_and_compare("run", whole)


@pytest.mark.slow
def test_an_environment_that_fails_on_one_rank_sets_all_back(whole: Path) -> None:
    def fail() -> None:
        raise EnvironmentFailure("task Pendulum-v1#2 fails")

    ended = run_ranks(*FAULTS, "run_dir=run", before=at(SlotEngine, "finish", 20, fail))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    assert ended[0].out.count("warning: rank 1: task Pendulum-v1#2 fails; going on from the checkpoint at") == 1
    assert_same_run(whole.parent / "run", whole)


@pytest.mark.slow
def test_an_episode_that_fails_again_on_one_rank_is_left_out_by_all(folder: Path) -> None:
    """In the middle of it, so that all cut it off; what the ranks have learnt is the same in the end."""

    def before(rank: int) -> None:
        plain = Slot.step

        def step(slot: Slot) -> None:
            if rank == 1 and slot.index == 2 and slot.episode == 0 and len(slot.actions) == 15:
                raise OSError("gone")
            plain(slot)

        monkeypatch.setattr(Slot, "step", step)

    with pytest.MonkeyPatch.context() as monkeypatch:
        ended = run_ranks(*FAULTS, "run_dir=run", before=before)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    said = " ".join(ended[0].out.split())
    assert said.count("going on from the checkpoint at 80 transitions") == 2
    assert said.count("going on from the checkpoint at 80 transitions without that episode") == 1
    slots = load_checkpoint(find_checkpoint(Path("run")) / "rank-1")["engine"]["slots"]
    assert [slot["left_out"] for slot in slots] == [[], [], [0], []]


REFUSED = {
    "a minibatch (algorithm.rollout_transitions_per_task / minibatches) has 21 rows, which 2 ranks cannot divide; "
    "give a multiple of 2": (*PPO, "algorithm.rollout_transitions_per_task=42", "env.envs_per_task=2"),
    "algorithm.batch_per_task has 7 rows, which 2 ranks cannot divide; give a multiple of 2": (
        *SAC, "algorithm.batch_per_task=7",
    ),
    "2 ranks cannot divide env.envs_per_task=1; give more, or tasks_per_rank": (*PPO, "env.envs_per_task=1"),
    "tasks_per_rank=3 deals 8 tasks to 3 groups of ranks, and there are 2 ranks; start 3 or a multiple, or give "
    "another tasks_per_rank": (*PPO, "tasks_per_rank=3"),
    "-m makes many runs, and torchrun starts several processes for one; leave one of them out": (
        "-m", *PPO, "seed=0,1",
    ),
}  # fmt: skip


def test_what_ranks_cannot_do_is_refused_in_one_line(folder: Path) -> None:
    def main() -> None:
        for words in REFUSED.values():
            sys.argv[1:] = [*last_of_each(words), "run_dir=run"]
            with pytest.raises(SystemExit) as stop:
                train.command()
            assert stop.value.code == 2

    first, other = run_ranks(main=main)
    assert (first.code, other.code) == (0, 0), first.err + other.err
    assert first.err.splitlines() == [f"error: {said}" for said in REFUSED]
    assert other.err == first.out == other.out == ""
    assert [path.name for path in folder.iterdir()] == [".ranks"]


def test_a_run_goes_on_with_as_many_ranks_only(whole: Path, command: Command) -> None:
    outcome = command("train", "resume=whole", "total_transitions=960")
    assert outcome.code == 2
    assert outcome.err.startswith("error: whole was trained by 2 ranks and not 1; start as many: torchrun")
    evaluated = command("evaluate", "run=whole", "episodes=1")
    assert evaluated.code == 0, evaluated.err


def test_other_commands_say_that_they_run_in_one_process(folder: Path) -> None:
    first, other = run_ranks("run=run", main=lambda: start("evaluate"))
    assert (first.code, other.code) == (2, 2)
    assert (
        first.err
        == "error: evaluate runs in one process, and torchrun is for train; python -m varshare_rl.evaluate\n"
    )
    assert other.err == ""


def test_restarts_need_a_run_to_go_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    first, _ = run_ranks(*PPO)
    assert first.code == 2
    assert "give run_dir=<folder> resume=auto" in first.err


def test_networks_that_differ_are_noticed(folder: Path) -> None:
    def drift(self: Run) -> None:
        with torch.no_grad():
            next(self.algorithm.trained_modules()["actor"].parameters())[0] += 1e-7

    def before(rank: int) -> None:
        if rank == 1:
            plain = Run.start
            Run.start = lambda self, *given: (drift(self), plain(self, *given))[1]  # type: ignore[method-assign]

    first, other = run_ranks(*PPO, "run_dir=run", before=before)
    assert (first.code, other.code) == (1, 1)
    assert first.err == (
        "error: a network, after 0 transitions, differs between ranks, and so their processors or packages; use "
        "machines of one kind\n"
    )


def test_a_part_of_an_engine_is_that_part_of_the_whole() -> None:
    """Of numpy physics and of objects, in training and in evaluation, and after a state was put back."""
    for suite in (PointMassSuite(PointMassConfig()), CartPoleSuite(CartPoleConfig()), pendulums()):
        for evaluation in (False, True):
            tasks, envs = len(suite.task_names), 3
            part = part_of(1, 4, tasks, envs, -(-tasks // 2))
            engine, own = suite.make_engine(envs, 5, evaluation), suite.make_engine(envs, 5, evaluation, part)
            slots = np.ix_(part.tasks, part.envs)
            assert np.array_equal(engine.reset()[slots], own.reset())
            shape = (tasks, envs, *(suite.action_space.shape or ()))
            actions = np.zeros(shape, suite.action_space.dtype)
            state = own.state()
            for step in range(45):
                mine, whole = own.step(actions[slots]), engine.step(actions)
                for name, value in vars(mine).items():
                    assert np.array_equal(value, vars(whole)[name][slots]), (suite.name, evaluation, step, name)
            own.load_state(state)
            assert np.array_equal(own.step(actions[slots]).obs.shape, mine.obs.shape)
            with pytest.raises(UserError, match="the saved environment state has"):
                suite.make_engine(envs, 5, evaluation, part_of(0, 4, tasks, envs, -(-tasks // 2))).load_state(state)


def pendulums() -> Suite:
    return GymnasiumConfig(ids=["Pendulum-v1", "Pendulum-v1"], horizon=20, workers=1).build()


TORCHRUN = ("torchrun", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "varshare_rl.train")
DYING = """
import os, gymnasium
from gymnasium.envs.classic_control.pendulum import PendulumEnv

class Dying(PendulumEnv):
    def step(self, action):
        if os.environ["RANK"] == "1" and os.path.exists("run/config.yaml") and not os.path.exists("died"):
            open("died", "w").close()
            os.kill(os.getpid(), 9)
        return super().step(action)

gymnasium.register("Dying-v0", Dying, max_episode_steps=30)
"""


@pytest.mark.slow
def test_torchrun_restarts_what_a_lost_rank_has_ended(folder: Path) -> None:
    Path("dying.py").write_text(DYING)
    words = [word for word in FAULTS if not word.startswith("env.ids")]
    outcomes = []
    for name in ("run", "other"):
        environment = {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
        command = [str(Path(sys.executable).parent / TORCHRUN[0]), *TORCHRUN[1:]]
        options = ["env.ids=[dying:Dying-v0,Pendulum-v1]", f"run_dir={name}", "resume=auto"]
        done = subprocess.run([*command, *words, *options], env=environment, capture_output=True, text=True)
        outcomes.append(done)
        assert done.returncode == 0, done.stderr
    assert Path("died").exists()
    assert "another rank of the 2 has ended" in outcomes[0].stderr
    assert "has ended" not in outcomes[1].stderr
    assert_same_run(folder / "run", folder / "other")


@pytest.mark.slow
def test_a_signal_to_torchrun_saves(folder: Path) -> None:
    words = [*last_of_each((*FAULTS, "total_transitions=10000000", "run_dir=run", "log.quiet=false"))]
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / TORCHRUN[0]), *TORCHRUN[1:3], *TORCHRUN[5:], *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not Path("run/checkpoints/last-000000000080").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "all saved; go on with:\n    torchrun --nproc-per-node 2 -m varshare_rl.train resume=run" in out, err
    assert load_checkpoint(find_checkpoint(Path("run")))["transitions"] >= 80


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_meta_world_on_two_ranks_goes_on_to_the_bit(folder: Path, algorithm: str) -> None:
    run = last_of_each((
        *TINY, *TINY_ALGORITHM[algorithm], *PLAIN, "env=mt3", "env.horizon=30", "env.goals_per_task=3",
        "env.workers=2", "env.envs_per_task=2", "log.every=60", "total_transitions=600", "tasks_per_rank=2",
    ))  # fmt: skip
    run_ranks(*run, "run_dir=whole")
    ended = run_ranks(*run, "run_dir=run", before=at(SlotEngine, "finish", 50, own(signal.SIGTERM)))
    assert [rank.code for rank in ended] == [143, 143], ended[0].err
    for rank in run_ranks("resume=run"):
        assert rank.code == 0, rank.err
    assert_same(final_state(folder / "run"), final_state(folder / "whole"))
    assert metrics(folder / "run") == metrics(folder / "whole")
