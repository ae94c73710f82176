"""A search for the best values by Optuna: trials of several seeds, in a database in the sweep's folder."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import IntervalSweep, Override

from varshare_rl.errors import UserError, missing_extra
from varshare_rl.fields import bounded
from varshare_rl.reporting.statistics import iqm
from varshare_rl.sweeps.plan import Job, Sweep
from varshare_rl.sweeps.results import SEED, scores_by_choice

STUDY = "sweep"
DATABASE = "study.db"


@dataclass
class OptunaConfig:
    """Options of ``hydra/sweeper=optuna``, below ``hydra.sweeper``."""

    name: str = "optuna"
    n_trials: int = bounded(20, least=1)
    "Trials in all; more of them go on with a search."
    n_jobs: int = bounded(1, least=1)
    "Trials whose runs are handed to the launcher at once."
    seed: int = bounded(0, least=0)
    "Seed of the search."
    startup_trials: int = bounded(10, least=1)
    "Trials at random, before those that learn from others."
    prune: bool = False
    """Leave out the further seeds of a trial whose first ones are below the median of the trials before, with one
    trial at a time (`n_jobs=1`)."""


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaConfig, provider="varshare_rl")


class Search:
    """A study of the options of a sweep, of which ``seed`` alone is not searched but pooled.

    Raises:
        UserError: Optuna is not installed, or there is nothing to search in.
    """

    def __init__(self, asked: Sweep, options: OptunaConfig) -> None:
        self._optuna = _optuna()
        self._asked, self._options = asked, options
        self.seeds = asked.swept.get(SEED)
        self._space = {key: self._distribution(override) for key, override in asked.searched.items()}
        lists = {key: values for key, values in asked.swept.items() if key != SEED}
        self._space |= {key: self._optuna.distributions.CategoricalDistribution(lists[key]) for key in lists}
        if not self._space:
            raise UserError(
                "hydra/sweeper=optuna has nothing to search in; give elbo.kl_weight='tag(log,interval(0.01,1))', "
                "network.rank='int(interval(1,16))' or values in a list"
            )

    @property
    def runs_per_trial(self) -> int:
        """Number of seeds."""
        return len(self.seeds or [""])

    def probes(self) -> list[Job]:
        """Return runs at the ends of all ranges and with every value of a list, to be checked before the search."""
        ends = {key: _ends(distribution) for key, distribution in self._space.items()}
        first = {key: values[0] for key, values in ends.items()}
        choices = [first | {key: value} for key, values in ends.items() for value in values]
        jobs = itertools.chain.from_iterable(self._jobs(chosen) for chosen in choices)
        return list({job.name: job for job in jobs}.values())

    def open(self) -> None:
        """Open the study in the sweep's folder, or begin it."""
        folder = self._asked.folder
        folder.mkdir(parents=True, exist_ok=True)
        if self._asked.overwrite:
            (folder / DATABASE).unlink(missing_ok=True)
        self._study = self._optuna.create_study(
            storage=f"sqlite:///{(folder / DATABASE).absolute()}", study_name=STUDY, direction="maximize",
            load_if_exists=True, pruner=self._optuna.pruners.MedianPruner(n_startup_trials=4),
        )  # fmt: skip

    def trials(self) -> Iterator[list[tuple[Any, list[Job]]]]:
        """Yield trials with their runs, as many at once as may be; those that were stopped come first.

        A sampler of its own for every trial makes the search that goes on the one that was never stopped.
        """
        running = self._optuna.trial.TrialState.RUNNING
        left = [frozen for frozen in self._study.trials if frozen.state == running]
        for frozen in [frozen for frozen in left if frozen.params.keys() != self._space.keys()]:
            self._study.tell(frozen.number, state=self._optuna.trial.TrialState.FAIL)  # killed while it was made
            left.remove(frozen)
        batch = [(frozen.number, frozen.params) for frozen in left]
        while True:
            while len(batch) < self._options.n_jobs and len(self._study.trials) < self._options.n_trials:
                number = len(self._study.trials)
                self._study.sampler = self._optuna.samplers.TPESampler(
                    n_startup_trials=self._options.startup_trials, seed=self._options.seed + number
                )
                trial = self._study.ask(self._space)
                batch.append((trial.number, trial.params))
            if not batch:
                return
            yield [(number, self._jobs(_words(params))) for number, params in batch]
            batch = []

    def tell(self, number: int, jobs: list[Job], pruned: bool = False) -> None:
        """Give a trial the interquartile mean of its runs' scores over seeds and tasks; it fails without any."""
        state = self._optuna.trial.TrialState
        _, scores = scores_by_choice(jobs)
        if not scores:
            self._study.tell(number, state=state.FAIL)
        elif pruned:
            self._study.tell(number, state=state.PRUNED)
        else:
            self._study.tell(number, float(iqm(next(iter(scores.values())))))

    @property
    def prunes(self) -> bool:
        """Return True if seeds of a trial may be left out."""
        return self._options.prune

    def below_median(self, number: int, jobs: list[Job]) -> bool:
        """Report the score of a trial's first runs, and return True if that of most trials was better."""
        frozen = self._study.trials[number]
        trial = self._optuna.trial.Trial(self._study, frozen._trial_id)
        _, scores = scores_by_choice(jobs)
        if not scores or len(jobs) == self.runs_per_trial:
            return False
        if len(jobs) not in frozen.intermediate_values:
            trial.report(float(iqm(next(iter(scores.values())))), step=len(jobs))
        return bool(trial.should_prune())

    def told(self) -> list[Job]:
        """Return the runs of the trials that have ended."""
        ended = [frozen for frozen in self._study.trials if frozen.state.is_finished()]
        return [job for frozen in ended for job in self._jobs(_words(frozen.params)) if job.folder.is_dir()]

    def _jobs(self, chosen: dict[str, str]) -> list[Job]:
        if self.seeds is None:
            return [self._asked.job(chosen)]
        return [self._asked.job({**chosen, SEED: seed}) for seed in self.seeds]

    def _distribution(self, override: Override) -> Any:
        interval = override.value()
        if not isinstance(interval, IntervalSweep) or interval.start is None or interval.end is None:
            raise UserError(f"{override.input_line} is no range to search in; give interval(<least>,<most>)")
        low, high, log = interval.start, interval.end, "log" in interval.tags
        if not low < high or (log and low <= 0):
            raise UserError(f"{override.input_line}: its ends must ascend, and be positive on a logarithmic scale")
        whole = isinstance(low, int) and isinstance(high, int)
        kind = self._optuna.distributions.IntDistribution if whole else self._optuna.distributions.FloatDistribution
        return kind(low, high, log=log)


def _ends(distribution: Any) -> list[str]:
    """The ends of a range, or all values of a list, as words."""
    values = getattr(distribution, "choices", None)
    return list(_words(dict(enumerate(values or (distribution.low, distribution.high)))).values())


def _words(params: dict[Any, Any]) -> dict[Any, str]:
    """Values as the command line has them; six digits are enough to search with."""
    return {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in params.items()}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise missing_extra("hydra/sweeper=optuna needs Optuna", "sweeps") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
