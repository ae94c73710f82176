"""Runs side by side: which belong together, what sets groups apart, what is in the way, and their statistics."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from varshare_rl.reporting.run_records import Options, RunRecord, Values
from varshare_rl.reporting.statistics import (
    FEW_RUNS,
    Band,
    Interval,
    aggregates,
    iqm_band,
    mean_band,
    performance_profile,
    probability_of_improvement,
    task_means,
)

#: Options, or beginnings of them, that are no part of a method: runs that differ in them alone are one group.
APART_FROM_METHOD = (
    "seed", "run_dir", "resume", "device", "plugins", "log.", "checkpoint.", "observe.", "evaluate.", "env.workers",
    "env.spaces", "env.tasks",
)  # fmt: skip
#: Conditions of the machine and the code: they do not change what a task is.
OF_MACHINE = (
    "python", "varshare_rl", "torch", "numpy", "seed", "device", "device_name", "threads", "cpu_count",
    "git_commit", "git_dirty", "matmul_precision", "overlap", "suite", "checkpoint", "evaluation_seed",
)  # fmt: skip
#: Budgets count as equal when they differ by less than this share: runs end with whole steps of all environments.
BUDGET_TOLERANCE = 0.01
#: Moments of a learning curve.
MOMENTS = 60
THRESHOLDS = 101
#: Statistics of a group in words, where there are tasks enough.
STATISTICS = {
    "iqm": "interquartile mean", "mean": "mean", "median": "median of tasks", "worst_1": "worst task",
    "worst_3": "worst 3 tasks", "worst_10": "worst 10 tasks",
}  # fmt: skip


@dataclass(frozen=True)
class LearningCurve:
    """Moments ``[K]``, the interquartile mean there ``[K]``, and every task's mean ``[T, K]``, with their bands."""

    at: Values
    iqm: Band
    tasks: Band


@dataclass
class Group:
    """Runs that differ in their seeds alone.

    ``runs`` are all, ``scored`` those that have final scores ``[S, T]``. Everything below that is None, or empty,
    where there are none.
    """

    label: str
    runs: Sequence[RunRecord]
    scored: Sequence[RunRecord] = ()
    scores: Values = field(default_factory=lambda: np.zeros((0, 0)))
    statistics: Mapping[str, Interval] = field(default_factory=dict)
    tasks: Sequence[Interval] = ()
    profile: Band | None = None
    curves: Mapping[str, LearningCurve] = field(default_factory=dict)

    @property
    def options(self) -> Options:
        """Options of its runs."""
        return self.runs[0].options


@dataclass
class Section:
    """Groups on the same tasks.

    ``differences``, ``warnings`` and ``notes`` are sentences; ``improvement`` has how probably the first of two
    groups, by their places, beats the second.
    """

    name: str
    tasks: tuple[str, ...]
    measure: str
    groups: Sequence[Group]
    differences: Sequence[str]
    warnings: Sequence[str]
    notes: Sequence[str]
    moment: str = "at the end"  # when the scores are from
    thresholds: Values = field(default_factory=lambda: np.zeros(0))
    improvement: Mapping[tuple[int, int], Interval] = field(default_factory=dict)

    @property
    def digits(self) -> int:
        """Decimals that scores are printed with."""
        return 1 if self.measure == "return" else 3

    @property
    def scored(self) -> list[Group]:
        """Groups with final scores."""
        return [group for group in self.groups if len(group.scores)]


def compare_runs(
    runs: Sequence[RunRecord],
    sentence: Callable[[str], str] = lambda option: "",
    at: int | None = None,
    measure: str | None = None,
) -> list[Section]:
    """Compare runs, a section for those on the same tasks.

    Args:
        runs: of any suites.
        sentence: what an option means, by its dotted name.
        at: transitions after which they are compared; None: at the end of each.
        measure: ``success``, ``success_final`` or ``return``; None: success where all runs of a section have it,
            else return.
    """
    places: dict[Hashable, list[RunRecord]] = {}
    for run in runs:
        places.setdefault((run.options["env.name"], run.tasks), []).append(run)
    names = _section_names(list(places.values()))
    return [
        _section(name, found, sentence, at, measure) for name, found in zip(names, places.values(), strict=True)
    ]


def _section(
    name: str, runs: Sequence[RunRecord], sentence: Callable[[str], str], at: int | None, measure: str | None
) -> Section:
    groups, twins = _groups(runs if at is None else [_by(run, at) for run in runs])
    measure = measure or next(one for one in ("success", "return") if one == "return" or _all_have(groups, one))
    for group in groups:
        _score(group, measure, at)
    section = Section(
        name=name,
        tasks=runs[0].tasks,
        measure=measure,
        groups=groups,
        differences=differences(groups, sentence),
        warnings=[*twins, *warnings(groups, measure, at)],
        notes=notes(groups),
        moment="at the end" if at is None else f"at {at:,} transitions",
    )
    scored = section.scored
    if scored:
        values = np.concatenate([group.scores.ravel() for group in scored])
        ends = (0.0, 1.0) if measure != "return" else (float(values.min()), float(values.max()))
        section.thresholds = np.linspace(*ends, THRESHOLDS)
    for group in scored:
        group.profile = performance_profile(group.scores, section.thresholds)
    section.improvement = {
        (one, other): probability_of_improvement(groups[one].scores, groups[other].scores)
        for one, other in combinations(range(len(groups)), 2)
        if len(groups[one].scores) and len(groups[other].scores)
    }
    return section


def _score(group: Group, measure: str, at: int | None) -> None:
    """Compute everything that a group alone is asked for."""
    found = [(run, scores) for run in group.runs if (scores := final_scores(run, measure, at)) is not None]
    if found:
        group.scored = [run for run, _ in found]
        group.scores = np.stack([scores for _, scores in found])
        group.statistics = aggregates(group.scores)
        group.tasks = task_means(group.scores)
    group.curves = {
        axis: curve
        for axis in ("transitions", "seconds")
        if (curve := learning_curve(group.runs, measure, axis, at)) is not None
    }


def final_scores(run: RunRecord, measure: str, at: int | None) -> Values | None:
    """Return the scores of a run ``[T]`` at its end, or at its last evaluation by ``at``; None if it has none."""
    if at is None:
        scores = None if run.scores is None else run.scores[measure]
    else:
        reached = run.transitions >= at * (1.0 - BUDGET_TOLERANCE)
        curve = run.curves.until(at * (1.0 + BUDGET_TOLERANCE))
        scores = curve.values[measure][-1] if reached and len(curve.transitions) else None
    return None if scores is None or not np.isfinite(scores).all() else scores


def learning_curve(runs: Sequence[RunRecord], measure: str, axis: str, at: int | None) -> LearningCurve | None:
    """Return the curve of a group as far as all its runs go; between evaluations by straight lines.

    ``axis`` is ``transitions`` or ``seconds``. None where runs have fewer than two evaluations in common.
    """
    curves = [run.curves if at is None else run.curves.until(at * (1 + BUDGET_TOLERANCE)) for run in runs]
    points = [getattr(curve, axis) for curve in curves]
    if any(len(point) < 2 for point in points):
        return None
    first, last = max(point[0] for point in points), min(point[-1] for point in points)
    moments = np.unique(np.concatenate(points))
    moments = moments[(moments >= first) & (moments <= last)]
    if axis == "seconds" or len(moments) > MOMENTS:
        moments = np.linspace(first, last, min(len(moments), MOMENTS))
    values = np.stack([
        np.stack([np.interp(moments, point, curve.values[measure][:, task]) for task in range(len(runs[0].tasks))])
        for point, curve in zip(points, curves, strict=True)
    ])  # fmt: skip
    known = np.isfinite(values).all(axis=(0, 1))
    if known.sum() < 2 or first >= last:
        return None
    values = values[..., known]
    return LearningCurve(moments[known], iqm_band(values), mean_band(values))


def _groups(runs: Sequence[RunRecord]) -> tuple[list[Group], list[str]]:
    """Return groups in the order met, and a sentence for every run that is there twice; who came farther stays."""
    by_method: dict[Hashable, dict[int, RunRecord]] = {}
    twins = []
    for run in runs:
        of_method = by_method.setdefault(tuple(sorted(method_options(run).items())), {})
        first = of_method.setdefault(run.seed, run)
        if first is not run:
            kept, left_out = (run, first) if _progress(run) > _progress(first) else (first, run)
            of_method[run.seed] = kept
            twins.append(f"{left_out.folder} has the configuration and the seed of {kept.folder}: it is left out.")
    made = [[of_method[seed] for seed in sorted(of_method)] for of_method in by_method.values()]
    labels = group_labels([method_options(found[0]) for found in made])
    return [Group(label, found) for label, found in zip(labels, made, strict=True)], twins


def _by(run: RunRecord, at: int) -> RunRecord:
    """Return a run as it was at its last evaluation by ``at``; what there is of its end alone is left out."""
    seconds = run.curves.until(at * (1.0 + BUDGET_TOLERANCE)).seconds
    return replace(run, seconds=float(seconds[-1]) if len(seconds) else 0.0, nats=None, sharing=None)


def _progress(run: RunRecord) -> tuple[bool, int]:
    """Measure of how far a run came: to its end or not, and its transitions."""
    return run.scores is not None, run.transitions


def method_options(run: RunRecord) -> dict[str, bool | int | float | str]:
    """Return the options that make a run's method."""
    return {name: value for name, value in run.options.items() if not name.startswith(APART_FROM_METHOD)}


def group_labels(options: Sequence[Options]) -> list[str]:
    """Return the fewest options that tell groups apart, in the words of a command line; chosen components first."""
    varying = [name for name in _names(options) if len({word(own.get(name)) for own in options}) > 1]
    varying.sort(key=lambda name: not name.endswith(".name"))
    chosen: list[str] = []

    def told_apart(names: Sequence[str]) -> int:
        return len({tuple(word(own.get(name)) for name in names) for own in options})

    for name in varying:
        if told_apart([*chosen, name]) > told_apart(chosen):
            chosen.append(name)
    for name in list(chosen):
        rest = [other for other in chosen if other != name]
        if told_apart(rest) == told_apart(chosen):
            chosen = rest
    if not chosen:
        return [str(own.get("network.name", "all runs")) for own in options]
    if len(chosen) == 1 and chosen[0].endswith(".name"):
        return [word(own[chosen[0]]) for own in options]
    return [
        " ".join(f"{name.removesuffix('.name')}={word(own[name])}" for name in chosen if name in own)
        for own in options
    ]


def differences(groups: Sequence[Group], sentence: Callable[[str], str]) -> list[str]:
    """Return a sentence for every option in which groups differ."""
    options = [method_options(group.runs[0]) for group in groups]
    found = []
    for name in _names(options):
        given = [word(own[name]) if name in own else None for own in options]
        if len(set(given)) > 1:
            said = sentence(name).rstrip(".").replace("`", "")
            meaning = f" ({said[:1].lower()}{said[1:]})" if said else ""
            found.append(f"{name.removesuffix('.name')}{meaning} is {_by_value(given, groups)}.")
    return found


def _by_value(given: Sequence[str | None], groups: Sequence[Group]) -> str:
    """Return ``0.1 in A and B, 1 in C``; groups without the option come last."""
    by_value: dict[str | None, list[str]] = {}
    for value, group in zip(given, groups, strict=True):
        by_value.setdefault(value, []).append(group.label)
    words = [f"{value} in {_listed(labels)}" for value, labels in by_value.items() if value is not None]
    if None in by_value:
        words.append(f"no option of {_listed(by_value[None])}")
    return ", ".join(words)


def warnings(groups: Sequence[Group], measure: str, at: int | None) -> list[str]:
    """Return a sentence for everything that stands in the way of a comparison."""
    runs = [(group, run) for group in groups for run in group.runs]
    scored = [(group, run) for group in groups for run in group.scored]
    found = [
        f"{group.label}, seed {run.seed}, was stopped or still runs: {run.transitions:,} of "
        f"{int(run.options['total_transitions']):,} transitions ({run.folder}). "
        + ("" if any(run is one for one in group.scored) else "Its curve counts, its scores do not.")
        for group, run in runs
        if run.scores is None
    ]
    found += [
        f"{group.label}, seed {run.seed}, has no {measure} for every task there: its scores are left out."
        for group, run in runs
        if run.scores is not None and not any(run is one for one in group.scored)
    ]
    ended = [(group, run) for group, run in scored if run.conditions]
    for name in dict.fromkeys(name for _, run in ended for name in run.conditions if name not in OF_MACHINE):
        found += _differing(name, [(group, run, run.conditions.get(name)) for group, run in ended])
    found += _differing(
        "evaluate.episodes", [(group, run, run.options["evaluate.episodes"]) for group, run in scored],
        "scores of few episodes are coarser",
    )  # fmt: skip
    if at is None:
        budgets = [(group, run, f"{run.transitions:,}") for group, run in scored]
        least = min((run.transitions for _, run in scored), default=0)
        if least and max(run.transitions for _, run in scored) > least * (1 + BUDGET_TOLERANCE):
            found += _differing("the number of transitions", budgets, f"at={least} compares them there")
    alone = [group.label for group in groups if len(group.scored) == 1]
    few = [group.label for group in groups if 1 < len(group.scored) <= FEW_RUNS]
    found += [f"One run of {_listed(alone)}: there is no interval."] if alone else []
    return found + ([f"Three runs or fewer of {_listed(few)}: their intervals are too narrow."] if few else [])


def notes(groups: Sequence[Group]) -> list[str]:
    """Return what readers should know besides: other seeds, other code, other machines."""
    ended = [(group, run) for group in groups for run in group.runs if run.conditions]
    seeds = [(group, group.runs[0], _listed([str(run.seed) for run in group.runs])) for group in groups]
    found = [] if len({value for *_, value in seeds}) == 1 else [
        "Groups have other seeds: " + "; ".join(f"{group.label} {value}" for group, _, value in seeds) + "."
    ]  # fmt: skip
    for name, why in (("git_commit", "made by other code"), ("torch", "made with other versions"),
                      ("device_name", "their seconds cannot be compared"),
                      ("threads", "their seconds cannot be compared")):  # fmt: skip
        found += _differing(name, [(group, run, _short(run.conditions.get(name))) for group, run in ended], why)
    if any(run.conditions.get("git_dirty") for _, run in ended):
        found.append("Some runs were made by code with changes that are in no commit.")
    return found


def _differing(name: str, given: Sequence[tuple[Group, RunRecord, Any]], why: str = "") -> list[str]:
    """Return a sentence if a value is not the same in all runs."""
    by_value: dict[str, dict[str, list[int]]] = {}
    for group, run, value in given:
        by_value.setdefault(word(value), {}).setdefault(group.label, []).append(run.seed)
    if len(by_value) < 2:
        return []
    words = []
    for value, by_group in by_value.items():
        where = []
        for label, seeds in by_group.items():
            whole = len(seeds) == sum(group.label == label for group, *_ in given)
            where.append(label if whole else f"{label} (seed {_listed([str(seed) for seed in seeds])})")
        words.append(f"{value} in {_listed(where)}")
    return [f"Runs differ in {name}: {'; '.join(words)}" + (f" ({why})." if why else ".")]


def _section_names(places: Sequence[Sequence[RunRecord]]) -> list[str]:
    """Return a name for every section: the suite's, with its tasks where there are several of one name."""
    suites = [
        str(
            next(
                (run.conditions["suite"] for run in runs if "suite" in run.conditions), runs[0].options["env.name"]
            )
        )
        for runs in places
    ]
    names = []
    for suite, runs in zip(suites, places, strict=True):
        tasks = runs[0].tasks
        shown = ", ".join(tasks[:4]) + (", ..." if len(tasks) > 4 else "")
        names.append(suite if suites.count(suite) == 1 else f"{suite}: {_counted(len(tasks), 'task')}, {shown}")
    return [name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]


def _all_have(groups: Sequence[Group], measure: str) -> bool:
    def has(run: RunRecord) -> bool:
        final = run.curves.values[measure][-1:] if run.scores is None else run.scores[measure]
        return bool(np.isfinite(final).all())

    return all(has(run) for group in groups for run in group.runs)


def _names(options: Sequence[Options]) -> list[str]:
    return list(dict.fromkeys(name for own in options for name in own))


def word(value: Any) -> str:
    """Return a value as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).replace("'", "").replace("None", "null")


def _short(value: Any) -> Any:
    """Return the beginning of a commit's name."""
    return value[:7] if isinstance(value, str) and len(value) == 40 else value


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
