"""Figures of runs side by side: learning curves, tasks, aggregates, profiles, improvement, parameters, sharing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from varshare_rl.reporting.comparison import STATISTICS, Group, Section
from varshare_rl.reporting.figures import (
    draw_heat_map,
    grid_of_panels,
    legend_below,
    legend_height,
    log_axis,
    new_figure,
    plain,
    plain_axes,
    styled,
)
from varshare_rl.reporting.run_records import Values
from varshare_rl.reporting.statistics import Band, Interval
from varshare_rl.reporting.style import COLUMN, INK, PAGE, Look, look

#: The look of every group, by its label.
Looks = Mapping[str, Look]

#: Panels side by side for many tasks, and marks in a figure of them; more become a heat map.
ACROSS, MOST_MARKS = 4, 60
#: Groups whose bands can be told apart in a small panel, up to this many.
BANDED = 6
#: Pairs that are drawn as a row each; more become a heat map.
MOST_PAIRS = 12


def group_looks(sections: Sequence[Section]) -> Looks:
    """Give every group its look, the same in all sections that it is in."""
    labels = dict.fromkeys(group.label for section in sections for group in section.groups)
    return {label: look(index) for index, label in enumerate(labels)}


@styled
def comparison_figures(section: Section, looks: Looks) -> dict[str, Figure]:
    """Draw all figures that a section has numbers for, by name."""
    figures = {
        "learning": learning_figure,
        "tasks_learning": tasks_learning_figure,
        "aggregates": aggregates_figure,
        "tasks": tasks_figure,
        "profiles": profiles_figure,
        "improvement": improvement_figure,
        "parameters": parameters_figure,
        "sharing": sharing_figure,
    }
    made = {name: draw(section, looks) for name, draw in figures.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def learning_figure(section: Section, looks: Looks) -> Figure | None:
    """Draw the interquartile mean over tasks and runs against transitions and seconds, with its band."""
    axes_names = [axis for axis in ("transitions", "seconds") if any(axis in g.curves for g in section.groups)]
    if not axes_names:
        return None
    figure = new_figure(PAGE, 2.7)
    panels = figure.subplots(1, len(axes_names), sharey=True, squeeze=False)[0]
    for axes, axis in zip(panels, axes_names, strict=True):
        for group in section.groups:
            if axis in group.curves:
                _draw_band(axes, group.curves[axis].at, group.curves[axis].iqm, looks[group.label])
        axes.set_xlabel("transitions, all tasks together" if axis == "transitions" else "seconds of the run")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _score_axis(axes, section, "y")
    panels[0].set_ylabel(f"{_named(section.measure)}, interquartile mean")
    _legend(figure, [group for group in section.groups if group.curves], looks)
    figure.suptitle(f"{section.name}: learning, with 95 % bands")
    return figure


def tasks_learning_figure(section: Section, looks: Looks) -> Figure | None:
    """Draw a panel per task: the mean over runs against transitions; bands of many groups would hide each other."""
    groups = [group for group in section.groups if "transitions" in group.curves]
    number = len(section.tasks)
    if not groups or number < 2:
        return None
    most = ACROSS if number <= 16 else ACROSS + 1
    across = -(-number // -(-number // most))
    figure = new_figure(PAGE, 0.8 + 1.35 * -(-number // across))
    panels = grid_of_panels(figure, number, across, "transitions", sharex=True, sharey=section.measure != "return")
    banded = len(groups) <= BANDED
    for index, axes in enumerate(panels):
        for group in groups:
            curve = group.curves["transitions"]
            band = curve.tasks.row(index)
            _draw_band(axes, curve.at, band if banded else Band(band.points, None, None), looks[group.label], 1.1)
        axes.set_title(plain(section.tasks[index], 24), fontsize=7, pad=3)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        _score_axis(axes, section, "y")
    figure.supylabel(f"{_named(section.measure)}, mean of runs", fontsize=8)
    _legend(figure, groups, looks)
    figure.suptitle(f"{section.name}: learning of every task" + ", with 95 % bands" * banded)
    return figure


def aggregates_figure(section: Section, looks: Looks) -> Figure | None:
    """Draw a panel per statistic, and in it a row per group with its interval."""
    groups = section.scored
    if not groups:
        return None
    names = [name for name in STATISTICS if name in groups[0].statistics]
    figure = new_figure(PAGE, 0.7 + -(-len(names) // 3) * (0.45 + 0.19 * len(groups)))
    panels = grid_of_panels(figure, len(names), min(3, len(names)), sharey=True)
    for axes, name in zip(panels, names, strict=True):
        for row, group in enumerate(groups):
            _draw_interval(axes, group.statistics[name], row, looks[group.label])
        _rows(axes, [group.label for group in groups])
        _score_axis(axes, section, "x")
        axes.set_xlabel(STATISTICS[name])
        axes.tick_params(labelbottom=True)
    figure.suptitle(f"{section.name}: {_named(section.measure)} {section.moment}, with 95 % intervals")
    return figure


def tasks_figure(section: Section, looks: Looks) -> Figure | None:
    """Draw every task's mean: bars with intervals, or a heat map where there are many."""
    groups, tasks = section.scored, section.tasks
    if not groups or len(tasks) < 2:
        return None
    title = f"{section.name}: {_named(section.measure)} of every task {section.moment}, mean of runs"
    if len(groups) * len(tasks) > MOST_MARKS:
        matrix = np.array([[interval.point for interval in group.tasks] for group in groups]).T
        low, high = (0.0, 1.0) if section.measure != "return" else (float(matrix.min()), float(matrix.max()))
        figure = new_figure(min(PAGE, 2.6 + 0.42 * len(groups)), 1.8 + 0.155 * len(tasks))
        draw_heat_map(
            figure.subplots(), matrix, tasks, [group.label for group in groups], low, high,
            _named(section.measure), annotated=max(matrix.shape),
        )  # fmt: skip
        figure.suptitle(title)
        return figure
    height = 0.8 / len(groups)
    figure = new_figure(PAGE, 1.0 + len(tasks) * (0.12 + 0.12 * len(groups)))
    axes = figure.subplots()
    for place, group in enumerate(groups):
        rows = np.arange(len(tasks)) + (place - (len(groups) - 1) / 2) * height
        means = [interval.point for interval in group.tasks]
        colour = looks[group.label].colour
        axes.barh(rows, means, height * 0.9, color=colour, alpha=0.45, linewidth=0)
        for row, interval in zip(rows, group.tasks, strict=True):
            _draw_interval(axes, interval, float(row), looks[group.label])
    _rows(axes, [plain(task, 40) for task in tasks])
    _score_axis(axes, section, "x")
    axes.set_xlabel(_named(section.measure))
    _legend(figure, groups, looks, lines=False)
    figure.suptitle(f"{title}, with 95 % intervals")
    return figure


def profiles_figure(section: Section, looks: Looks) -> Figure | None:
    """Draw which share of runs and tasks is above a score, for every score."""
    if not section.scored:
        return None
    figure = new_figure(COLUMN, 2.4 + legend_height(COLUMN, [group.label for group in section.scored]))
    axes = figure.subplots()
    for group in section.scored:
        assert group.profile is not None
        _draw_band(axes, section.thresholds, group.profile, looks[group.label])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(rf"{_named(section.measure)} $\tau$")
    axes.set_ylabel(r"share of scores above $\tau$")
    plain_axes(axes, grid="both")
    _legend(figure, section.scored, looks)
    figure.suptitle(f"{section.name}: performance profiles")
    return figure


def improvement_figure(section: Section, looks: Looks) -> Figure | None:
    """Draw how probably a run of one group beats one of another on a task: a row per pair, or a heat map."""
    if not section.improvement:
        return None
    title = f"{section.name}: probability of improvement"
    labels = [group.label for group in section.groups]
    if len(section.improvement) > MOST_PAIRS:
        matrix = np.full((len(labels), len(labels)), np.nan)
        for (one, other), interval in section.improvement.items():
            matrix[one, other], matrix[other, one] = interval.point, 1.0 - interval.point
        side = min(PAGE, 2.4 + 0.34 * len(labels))
        figure = new_figure(side, side)
        draw_heat_map(figure.subplots(), matrix, labels, labels, 0.0, 1.0, "P(row > column)", annotated=24)
        figure.suptitle(title)
        return figure
    figure = new_figure(PAGE, 0.9 + 0.24 * len(section.improvement))
    axes = figure.subplots()
    rows = list(section.improvement.items())
    for row, ((one, _), interval) in enumerate(rows):
        _draw_interval(axes, interval, row, looks[labels[one]])
    _rows(axes, [f"{labels[one]}  >  {labels[other]}" for (one, other), _ in rows])
    axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel(r"$P(X > Y)$ on a task, ties half")
    plain_axes(axes, grid="x")
    figure.suptitle(f"{title}, with 95 % intervals")
    return figure


def parameters_figure(section: Section, looks: Looks) -> Figure | None:
    """Draw the interquartile mean against the parameters stored, and those active in one task."""
    groups = [group for group in section.scored if group.scored[0].parameters is not None]
    if not groups:
        return None
    figure = new_figure(PAGE, 2.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, label) in zip(
        panels, {"stored": "parameters stored", "active_per_task": "parameters active in one task"}.items(),
        strict=True,
    ):  # fmt: skip
        counts = []
        for group in groups:
            drawn, interval = looks[group.label], group.statistics["iqm"]
            assert group.scored[0].parameters is not None
            counts.append(group.scored[0].parameters[name])
            if interval.low is not None:
                axes.plot([counts[-1]] * 2, [interval.low, interval.high], color=drawn.colour, linewidth=1.2)
            axes.plot(counts[-1], interval.point, drawn.marker, color=drawn.colour, markersize=5)
        log_axis(axes, min(counts) / 1.6, max(counts) * 1.6)
        axes.set_xlabel(label)
        _score_axis(axes, section, "y")
        plain_axes(axes, grid="both")
    panels[0].set_ylabel(f"{_named(section.measure)}, IQM")
    _legend(figure, groups, looks, lines=False)
    figure.suptitle(f"{section.name}: {_named(section.measure)} against parameters, with 95 % intervals")
    return figure


def sharing_figure(section: Section, looks: Looks) -> Figure | None:
    """Draw every task's divergence from its prior, and the sharing of all layers; runs are small marks."""
    with_nats = [group for group in section.groups if any(run.nats is not None for run in group.runs)]
    with_sharing = [group for group in section.groups if any(run.sharing is not None for run in group.runs)]
    if not with_nats and not with_sharing:
        return None
    drawn: list[tuple[float, Callable[[Axes], None]]] = []
    if with_nats:
        drawn.append((0.16 * len(section.tasks), lambda axes: _draw_nats(axes, section, with_nats, looks)))
    if with_sharing:
        drawn.append((0.2 * len(with_sharing), lambda axes: _draw_sharing(axes, with_sharing, looks)))
    heights = [max(height, 0.35) for height, _ in drawn]
    figure = new_figure(PAGE, 1.0 + sum(heights) + 0.55 * len(drawn))
    for axes, (_, draw) in zip(
        figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0], drawn, strict=True
    ):
        draw(axes)
        plain_axes(axes, grid="x")
    shown = [group for group in section.groups if group in with_nats or group in with_sharing]
    _legend(figure, shown, looks, lines=False)
    figure.suptitle(f"{section.name}: nats and sharing at the end")
    return figure


def _draw_nats(axes: Axes, section: Section, groups: Sequence[Group], looks: Looks) -> None:
    for place, group in enumerate(groups):
        shift = (place - (len(groups) - 1) / 2) * 0.6 / len(groups)
        values = np.stack([run.nats for run in group.runs if run.nats is not None])
        seen, rows = looks[group.label], np.arange(len(section.tasks)) + shift
        axes.plot(
            values.T, np.repeat(rows[:, None], len(values), 1), ".", color=seen.colour, markersize=3, alpha=0.5
        )
        axes.plot(values.mean(0), rows, seen.marker, color=seen.colour, markersize=4.5)
    low, high = (
        found([run.nats for group in groups for run in group.runs if run.nats is not None])
        for found in (np.min, np.max)
    )
    if low >= 1.0:
        log_axis(axes, low / 1.3, high * 1.3)
    else:
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xlim(0.0, high * 1.3 + 1.0)
    axes.set_xlabel("nats of a task, all layers: divergence from the prior")
    _rows(axes, [plain(task, 40) for task in section.tasks])


def _draw_sharing(axes: Axes, groups: Sequence[Group], looks: Looks) -> None:
    for row, group in enumerate(groups):
        values = [run.sharing for run in group.runs if run.sharing is not None]
        seen = looks[group.label]
        axes.plot(values, [row] * len(values), ".", color=seen.colour, markersize=4, alpha=0.5, clip_on=False)
        axes.plot(np.mean(values), row, seen.marker, color=seen.colour, markersize=5, clip_on=False)
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel(
        r"sharing of all layers, $\|\overline{W}\|^2\,/\,\overline{\|W_i\|^2}$ (1: all tasks have the same weights)"
    )
    _rows(axes, [group.label for group in groups])


def _draw_band(axes: Axes, at: Values, band: Band, seen: Look, width: float = 1.4) -> None:
    axes.plot(at, band.points, linewidth=width, **seen.line)
    if band.low is not None and band.high is not None:
        axes.fill_between(at, band.low, band.high, color=seen.colour, alpha=0.16, linewidth=0)


def _draw_interval(axes: Axes, interval: Interval, row: float, seen: Look) -> None:
    if interval.low is not None and interval.high is not None:
        axes.plot([interval.low, interval.high], [row, row], color=seen.colour, linewidth=1.6, clip_on=False)
    axes.plot(interval.point, row, seen.marker, color=seen.colour, markersize=4, clip_on=False)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows of an axes, the first at the top."""
    axes.set_yticks(range(len(labels)), [plain(label, 44) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _score_axis(axes: Axes, section: Section, axis: str) -> None:
    """Give successes their whole range, and lines along the scores."""
    if section.measure != "return":
        (axes.set_ylim if axis == "y" else axes.set_xlim)(-0.03, 1.03)
    plain_axes(axes, grid="y" if axis == "y" else "x")


def _legend(figure: Figure, groups: Sequence[Group], looks: Looks, lines: bool = True) -> None:
    handles = [
        Line2D([], [], linewidth=1.4, **looks[group.label].line)
        if lines
        else Line2D([], [], linestyle="", marker=looks[group.label].marker, color=looks[group.label].colour)
        for group in groups
    ]
    legend_below(figure, handles, [group.label for group in groups])


def _named(measure: str) -> str:
    return {"success_final": "success at the last step"}.get(measure, measure)
