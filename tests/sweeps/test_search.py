"""A search by Optuna: checked, pooled over seeds, gone on with as if it had never been stopped."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from helpers import TINY, TINY_ALGORITHM

from varshare_rl.reading import read_object
from varshare_rl.reporting.statistics import iqm
from varshare_rl.run.loop import Run
from varshare_rl.sweeps import search

optuna = pytest.importorskip("optuna")

RUN = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=80")
SEARCH = (
    "-m", *RUN, "hydra/sweeper=optuna", "hydra.sweeper.startup_trials=2", "seed=0,1",
    "elbo.kl_weight=tag(log,interval(0.01,10))", "network.rank=int(interval(1,8))",
)  # fmt: skip


def study(folder: str) -> Any:
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/study.db")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("seed=0,1",), "nothing to search in"),
        (("elbo.kl_weight=interval(-1,1)",), "elbo.kl_weight is -1.0"),
        (("elbo.kl_weight=tag(log,interval(0,1))",), "positive on a logarithmic scale"),
        (("elbo.kl_weight=interval(1,0)",), "ends must ascend"),
        (("elbo.kl_weight=0,1", "hydra.sweeper.n_trials=0"), "hydra.sweeper.n_trials is 0"),
    ],
)
def test_everything_is_checked_first(command: Command, folder: Path, words: tuple[str, ...], named: str) -> None:
    outcome = command("train", "-m", *RUN, "hydra/sweeper=optuna", *words)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert named in outcome.err
    assert list(folder.rglob("*")) == []


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_stopped(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = command("train", *SEARCH, "hydra.sweeper.n_trials=3", "hydra.sweep.dir=whole")
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patched:
        plain, begun = Run.start, []

        def stopping(run: Run, evaluate: bool = False) -> None:
            plain(run, evaluate)
            begun.append(run)
            if len(begun) == 4:  # the second seed of the second trial
                os.kill(os.getpid(), signal.SIGINT)

        patched.setattr(Run, "start", stopping)
        stopped = command("train", *SEARCH, "hydra.sweeper.n_trials=3", "hydra.sweep.dir=halves")
    assert stopped.code == 130, stopped.err
    assert [trial.state.name for trial in study("halves").trials] == ["COMPLETE", "RUNNING"]
    again = command("train", *SEARCH, "hydra.sweeper.n_trials=3", "hydra.sweep.dir=halves")
    assert again.code == 0, again.err
    expected, found = study("whole").trials, study("halves").trials
    assert [(trial.params, trial.value) for trial in found] == [(trial.params, trial.value) for trial in expected]
    assert len(found) == 3
    rows = list(csv.DictReader((folder / "halves/sweep.csv").read_text().splitlines()))
    assert [(row["seeds"], row["network.rank"]) for row in rows] == [
        ("2", str(t.params["network.rank"])) for t in found
    ]
    name = f"kl_weight-{found[0].params['elbo.kl_weight']:.6g}_rank-{found[0].params['network.rank']}_seed-"
    documents = [read_object(folder / f"halves/{name}{seed}/summary.json") for seed in (0, 1)]
    scores = np.array([[task["success"] for task in document["tasks"].values()] for document in documents])
    assert found[0].value == pytest.approx(float(iqm(scores)))
    more = command("train", *SEARCH, "hydra.sweeper.n_trials=4", "hydra.sweep.dir=halves")
    assert more.code == 0, more.err
    assert len(study("halves").trials) == 4
    assert "[7/8]" in more.out


@pytest.mark.slow
def test_the_further_seeds_of_a_poor_trial_are_left_out(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_rank(jobs: list[Any]) -> tuple[str, dict[Any, Any]]:
        return "success", {(): np.full((len(jobs), 1), 1.0 / int(jobs[0].choices["network.rank"]))}

    monkeypatch.setattr(search, "scores_by_choice", by_rank)
    line = (*SEARCH, "hydra.sweeper.n_trials=8", "hydra.sweeper.prune=true", "hydra.sweep.dir=pruned")
    outcome = command("train", *line)
    assert outcome.code == 0, outcome.err
    trials = study("pruned").trials
    first_seeds: list[float] = []
    for trial in trials:
        score = 1.0 / trial.params["network.rank"]
        poor = len(first_seeds) >= 4 and score < np.median(first_seeds)
        assert trial.state.name == ("PRUNED" if poor else "COMPLETE")
        name = f"kl_weight-{trial.params['elbo.kl_weight']:.6g}_rank-{trial.params['network.rank']}_seed-"
        assert [(folder / f"pruned/{name}{seed}").exists() for seed in (0, 1)] == [True, not poor]
        first_seeds.append(score)
    assert any(trial.state.name == "PRUNED" for trial in trials)
    again = command("train", *line)
    assert again.code == 0, again.err
    assert [trial.state.name for trial in study("pruned").trials] == [trial.state.name for trial in trials]
