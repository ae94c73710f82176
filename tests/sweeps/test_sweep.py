"""Sweeps: checked before the first run, named by what differs, gone on with, summed up."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from helpers import SEQUENCE, TINY, TINY_ALGORITHM, last_of_each
from test_resume import assert_same, final_state, metrics, results

from varshare_rl.commands import attempts
from varshare_rl.config import load_config
from varshare_rl.reporting.statistics import iqm
from varshare_rl.run.folder import held_folder
from varshare_rl.run.loop import Run
from varshare_rl.sweeps.plan import Job, Sweep
from varshare_rl.sweeps.results import pool

RUN = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=160")
FOUR = ("elbo.kl_weight=0.1,1", "seed=0,1")
NAMES = [f"kl_weight-{weight}_seed-{seed}" for weight in ("0.1", "1") for seed in (0, 1)]


def only(folder: Path) -> Path:
    (made,) = (folder / "runs").iterdir()
    return made


def names(sweep: Path) -> list[str]:
    return sorted(path.name for path in sweep.iterdir() if path.is_dir())


def assert_refused(outcome: Any, named: str) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert named in outcome.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("elbo.kl_weight=0.01,-1,1",), "run kl_weight--1: elbo.kl_weight is -1"),
        (("seed=0,-1,2",), "run seed--1: seed is -1"),
        (
            ("network=varshare_lora,shared", "elbo.absorb.every=5"),
            "run network-shared: network=shared has no",
        ),
        (("env.tasks=[normal_left],[nowhere]",), "nowhere"),
        (("network=shared,moore", "network.active_parameters=100"), "network.active_parameters is 100"),
        (("run_dir=one", "seed=0,1"), "run_dir=one is the folder of one run, and this sweep has more"),
        (("run_dir=a,a",), "two runs of this sweep would have the folder a"),
        (("seed=0,0",), "two runs of this sweep would have the folder"),
        (("seed=0,1", "resume=runs/x"), "resume=runs/x is for one run"),
        (("elbo.kl_weight=interval(0.01,1)",), "add hydra/sweeper=optuna, or give elbo.kl_weight=<a>,<b>"),
        (("elbo.kl_wieght=0,1",), "kl_wieght"),
        (("+elbo.kl_wieght=0,1",), "kl_wieght"),
        (("seed=0,1", "hydra/launcher=nowhere"), "nowhere"),
        (("seed=0,1", "hydra.sweeper.no_such=1"), "no_such"),
    ],
)
def test_nothing_starts_unless_everything_can(
    command: Command, folder: Path, words: tuple[str, ...], named: str
) -> None:
    assert_refused(command("train", "-m", *RUN, *words), named)
    assert list(folder.rglob("*")) == []


def test_the_same_command_goes_on_and_sums_up(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second of four runs; the same command makes the rest, with the numbers of single runs."""
    with monkeypatch.context() as patched:
        plain, stepped = Run._after_step, []

        def stopping(run: Run) -> None:
            plain(run)
            stepped.append(run)
            if len(stepped) == 15:
                os.kill(os.getpid(), signal.SIGINT)

        patched.setattr(Run, "_after_step", stopping)
        stopped = command("train", "-m", *RUN, *FOUR)
    assert stopped.code == 130, stopped.err
    sweep = only(folder)
    assert re.fullmatch(r"sweep_pointmass_kl_weight_seed_[0-9a-f]{6}", sweep.name)
    assert names(sweep) == NAMES[:2]
    assert "4 runs in " in stopped.out
    assert "0 done already, 0 to go on, 4 to start" in stopped.out
    assert f"[2/4] {NAMES[1]}, 0:00:" in stopped.out
    assert "left for all" in stopped.out
    line = stopped.out.splitlines()[-1].strip()
    assert shlex.split(line)[:4] == ["python", "-m", "varshare_rl.train", "-m"]
    before = (sweep / NAMES[0] / "summary.json").read_bytes()

    again = command("train", *shlex.split(line)[3:])
    assert again.code == 0, again.err
    assert "1 done already, 1 to go on, 2 to start" in again.out
    assert [line[:5] for line in again.out.splitlines() if line.startswith("[")] == ["[2/4]", "[3/4]", "[4/4]"]
    assert names(sweep) == NAMES
    assert (sweep / NAMES[0] / "summary.json").read_bytes() == before
    for name in (NAMES[1], NAMES[2]):  # the one that was stopped, and one after it
        weight, seed = re.fullmatch(r"kl_weight-(.*)_seed-(.*)", name).groups()  # type: ignore[union-attr]
        alone = command("train", *RUN, f"elbo.kl_weight={weight}", f"seed={seed}", f"run_dir={name}")
        assert alone.code == 0, alone.err
        assert_same(final_state(sweep / name), final_state(folder / name))
        assert metrics(sweep / name) == metrics(folder / name)
        assert results(sweep / name) == results(folder / name)
    check_csv(sweep, "kl_weight-{}_seed-{}", ("0.1", "1"), ("0", "1"))

    third = command("train", "-m", *RUN, *FOUR)
    assert third.code == 0
    assert "4 done already, 0 to go on, 0 to start" in third.out
    assert "note:" not in third.out
    otherwise = command("train", "-m", *RUN, *FOUR, "evaluate.episodes=7", "on_divergence=stop")
    assert "4 done already" in otherwise.out
    assert re.search(
        r"note: 4 of them were made with .*evaluate\.episodes=\d, not 7.*; overwrite=true", otherwise.out
    )
    assert re.search(r"on_divergence=\w+, not stop", otherwise.out)
    more = command("train", "-m", *RUN, FOUR[0], "seed=0,1,2")  # the same sweep, with a seed more
    assert more.code == 0, more.err
    assert "6 runs in " in more.out
    assert "4 done already" in more.out
    assert names(sweep) == sorted([*NAMES, "kl_weight-0.1_seed-2", "kl_weight-1_seed-2"])
    assert "intervals of 3 seeds or fewer are too narrow" in more.out


def check_csv(sweep: Path, name: str, weights: Iterable[str], seeds: Iterable[str]) -> None:
    rows = list(csv.DictReader((sweep / "sweep.csv").read_text().splitlines()))
    assert [row["elbo.kl_weight"] for row in rows] == list(weights)
    for row in rows:
        found = [read(sweep / name.format(row["elbo.kl_weight"], seed) / "summary.json") for seed in seeds]
        scores = np.array([[task["success"] for task in summary["tasks"].values()] for summary in found])
        assert int(row["seeds"]) == len(scores)
        if row["statistic"].startswith("interquartile"):
            assert float(row["success"]) == pytest.approx(float(iqm(scores)))
        else:
            assert float(row["success"]) == pytest.approx(scores.mean())
        assert float(row["success_low"]) <= float(row["success"]) <= float(row["success_high"])


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_without_rliable_there_are_means_and_the_extra_is_named(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rliable", None)
    outcome = command("train", "-m", *RUN, "seed=0,1,2")
    assert outcome.code == 0, outcome.err
    assert "pip install -c constraints.txt -e '.[report]'" in outcome.out
    (row,) = csv.DictReader((only(folder) / "sweep.csv").read_text().splitlines())
    means = [read(only(folder) / f"seed-{seed}" / "summary.json")["mean_success"] for seed in range(3)]
    assert row["statistic"] == "mean over seeds and tasks, least and greatest seed"
    assert float(row["success"]) == pytest.approx(sum(means) / 3)
    assert (float(row["success_low"]), float(row["success_high"])) == pytest.approx((min(means), max(means)))


def test_a_run_that_fails_ends_no_other(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attempts.build_run

    def failing(config: Any, *rest: Any, **more: Any) -> Run:
        if config.seed == 0:
            raise ZeroDivisionError("a bug")
        return plain(config, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(attempts, "build_run", failing)
        outcome = command("train", "-m", *RUN, "seed=0,1")
    assert outcome.code == 1
    assert "error: run seed-0: " in outcome.err
    assert "ZeroDivisionError: a bug" in outcome.err
    assert names(only(folder)) == ["seed-1"]
    assert "1 of 2 runs are done; the same command goes on" in outcome.out
    assert command("train", "-m", *RUN, "seed=0,1").code == 0
    assert names(only(folder)) == ["seed-0", "seed-1"]


def test_a_folder_with_another_run_is_refused_and_overwritten_if_wanted(command: Command, folder: Path) -> None:
    chosen = ("hydra.sweep.dir=mine", "seed=0,1")
    assert command("train", "-m", *RUN, *chosen).code == 0
    stored = (folder / "mine/seed-0/summary.json").read_bytes()
    other = command("train", "-m", *RUN, "network.rank=2", *chosen)
    assert_refused(other, "network.rank is 2, and mine/seed-0 holds a run with 8")
    (folder / "mine/seed-0/notes.txt").write_text("keep")
    former = ["evaluation_best.json", "evaluation_stochastic.json", "metrics.csv", "wandb_id.txt", "failure.txt"]
    for name in former:
        (folder / "mine/seed-0" / name).write_text("of the run before")
    assert command("train", "-m", *RUN, "network.rank=2", *chosen, "overwrite=true").code == 0
    assert load_config(folder / "mine/seed-0/config.yaml").network.rank == 2
    assert (folder / "mine/seed-0/notes.txt").read_text() == "keep"
    assert not any((folder / "mine/seed-0" / name).exists() for name in former)
    assert (folder / "mine/seed-0/summary.json").read_bytes() != stored


def test_a_run_without_a_finite_return_does_not_keep_the_others_from_a_table(folder: Path) -> None:
    scores = {"0": [1.0, 3.0], "1": [None, 5.0], "2": [2.0, 4.0]}
    jobs = []
    for seed, (left, right) in scores.items():
        run = folder / f"seed-{seed}"
        run.mkdir()
        tasks = {"left": {"success": None, "return": left}, "right": {"success": None, "return": right}}
        (run / "summary.json").write_text(json.dumps({"tasks": tasks, "transitions": 10, "seconds": 1.0}))
        jobs.append(Job(run.name, {"seed": seed, "elbo.kl_weight": "1"}, [], run))
    results = pool(jobs)
    (row,) = results.rows
    assert (row.seeds, row.score.runs, row.score.point) == (3, 2, pytest.approx(2.5))
    assert results.remark.startswith("1 run with a return that is no number: left out")


def test_names_are_short_and_folders_never_the_same(command: Command, folder: Path) -> None:
    sweep = Sweep(Path("x"), [], {"a.tasks": ["[b,c]", "b_c"], "elbo/schedule": ["ramp"]}, {}, [], False)
    one, other = (job.name for job in sweep.grid())
    assert re.fullmatch("tasks-b_c_schedule-ramp_[0-9a-f]{6}", one)
    assert one != other
    long = Sweep(Path("x"), [], {"a": ["b" * 200, "b" * 201]}, {}, [], False).grid()
    assert len({job.name for job in long}) == 2
    assert max(len(job.name) for job in long) <= 120
    words = ("env.tasks=[normal_left],[normal_left,normal_right]", "elbo/schedule=ramp")
    outcome = command("train", "-m", *RUN, *words)
    assert outcome.code == 0, outcome.err
    assert names(only(folder)) == ["tasks-normal_left", "tasks-normal_left_normal_right"]
    again = command("train", "-m", *RUN, "run_dir=a,b")
    assert again.code == 0, again.err
    assert (folder / "a/summary.json").exists()
    assert (folder / "b/summary.json").exists()


@pytest.mark.slow
def test_sequences_sweep_too(command: Command, folder: Path) -> None:
    words = ("-m", *TINY, *TINY_ALGORITHM["ppo"], *SEQUENCE, "method=finetune,lora")
    outcome = command("continual", *words)
    assert outcome.code == 0, outcome.err
    sweep = only(folder)
    assert names(sweep) == ["method-finetune", "method-lora"]
    rows = list(csv.DictReader((sweep / "sweep.csv").read_text().splitlines()))
    last = read(sweep / "method-lora/summary.json")["success"][-1]
    assert float(rows[1]["success"]) == pytest.approx(float(iqm(np.array([last]))))
    assert "2 done already" in command("continual", *words).out


def test_resume_auto_of_a_single_run(command: Command, folder: Path) -> None:
    started = command("train", *RUN, "resume=auto")
    assert started.code == 0, started.err
    assert [path.name for path in (folder / "runs").iterdir()] == ["pointmass_ppo_varshare_lora_s0"]
    run_dir = folder / "runs/pointmass_ppo_varshare_lora_s0"
    stored = load_config(run_dir / "config.yaml")
    assert (stored.resume, stored.overwrite) == (None, False)
    done = command("train", *RUN, "resume=auto")
    assert done.code == 0
    assert done.out.startswith("done already: runs/")
    assert "note:" not in done.out
    otherwise = command("train", *RUN, "resume=auto", "evaluate.episodes=7")
    assert "not 7; overwrite=true makes it anew" in otherwise.out
    more = command("train", *RUN, "resume=auto", "total_transitions=320")
    assert more.code == 0, more.err
    assert read(run_dir / "summary.json")["transitions"] == 320
    assert_refused(command("train", *RUN, "resume=auto", "network.rank=2"), "network.rank is 2, and runs/")
    own = command("train", *RUN, "resume=auto", "network.rank=2", "run_dir=own")
    assert own.code == 0, own.err
    with held_folder(Path("own")):
        assert_refused(command("train", *RUN, "resume=auto", "network.rank=2", "run_dir=own"), "in use by process")


def test_a_sequence_keeps_its_budget(command: Command, folder: Path) -> None:
    """What is left of it would have another number of transitions a task than what is learnt."""
    words = (*TINY, *TINY_ALGORITHM["ppo"], *SEQUENCE, "method=finetune", "run_dir=run", "resume=auto")
    assert command("continual", *words).code == 0
    assert command("continual", *words).out == "done already: run/summary.json\n"
    more = command("continual", *words, "total_transitions=960")
    assert_refused(more, "total_transitions is 960, and run holds a run with 480")


@pytest.mark.slow
def test_resume_auto_knows_matched_widths(command: Command, folder: Path) -> None:
    words = (*RUN, "network.active_parameters=30000", "run_dir=run", "resume=auto")
    assert command("train", *words).code == 0
    assert command("train", *words).out.startswith("done already")
    assert command("train", *words, "total_transitions=240").code == 0


def test_overwrite_loses_nothing_where_it_cannot_start(command: Command, folder: Path) -> None:
    assert command("train", *RUN, "run_dir=run").code == 0
    before = {path: path.read_bytes() for path in sorted((folder / "run").rglob("*")) if path.is_file()}
    wrong = ("network=moore", "network.active_parameters=100", "overwrite=true")
    assert_refused(command("train", *RUN, "run_dir=run", *wrong), "active_parameters is 100")
    assert {path: path.read_bytes() for path in sorted((folder / "run").rglob("*")) if path.is_file()} == before
    assert command("train", *RUN, "run_dir=run", "seed=5", "overwrite=true").code == 0
    assert load_config(folder / "run/config.yaml").seed == 5
    assert len(list((folder / "run").glob("events*"))) == 1


TWELVE = (
    "-m", *RUN, "elbo.kl_weight=0.1,1,10", "seed=0,1,2,3", "total_transitions=640", "hydra.sweep.dir=sweep",
)  # fmt: skip


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "varshare_rl.train", *last_of_each(words)], cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(found: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_rest(sweep: Path) -> None:
    """Until what a killed process had started has ended, for seconds on end."""
    quiet_since = time.monotonic()
    while time.monotonic() < quiet_since + 5:
        locks = [path.read_text().split() for path in sweep.glob("*/.lock") if path.exists()]
        owners = [words[1] for words in locks if words]
        if any(Path("/proc", owner).exists() for owner in owners):
            quiet_since = time.monotonic()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twelve runs, left alone."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, *TWELVE)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, (out, err)
    return folder / "sweep"


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("launcher", ["", "joblib", "submitit_local"])
def test_a_sweep_that_is_stopped_and_killed_ends_with_the_numbers_of_one_that_is_not(
    tmp_path: Path, whole: Path, launcher: str
) -> None:
    chosen = {
        "": (), "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        "submitit_local": ("hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=4"),
    }[launcher]  # fmt: skip
    sweep = tmp_path / "sweep"

    def written(pattern: str) -> int:
        return len(list(sweep.glob(pattern)))

    process = start(tmp_path, *TWELVE, *chosen)
    wait_for(lambda: written("*/metrics.jsonl") >= 3 and written("*/config.yaml") >= 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, (out, err)
    assert "the same command goes on with the others" in out
    assert not list(sweep.glob("*/.lock"))
    done = written("*/summary.json")
    assert done < 12
    process = start(tmp_path, *TWELVE, *chosen)
    wait_for(lambda: written("*/summary.json") >= min(done + 2, 11), process)
    process.kill()
    process.communicate(timeout=200)  # the output of joblib's processes ends with them
    wait_for_rest(sweep)
    kept = {path: path.stat().st_mtime for path in sweep.glob("*/summary.json")}
    process = start(tmp_path, *TWELVE, *chosen)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, (out, err)
    assert {path: path.stat().st_mtime for path in kept} == kept
    made = sorted(path.parent.name for path in sweep.glob("*/summary.json"))
    assert len(made) == 12
    for name in made:
        assert_same(final_state(sweep / name), final_state(whole / name))
        assert metrics(sweep / name) == metrics(whole / name)
    assert (sweep / "sweep.csv").exists()
