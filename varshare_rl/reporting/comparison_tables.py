"""Tables of runs side by side: rows of plain values, as CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from varshare_rl.reporting.comparison import STATISTICS, Section
from varshare_rl.reporting.statistics import Interval

Row = dict[str, Any]

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "$": r"\$", "&": r"\&", "#": r"\#",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def group_rows(sections: Sequence[Section]) -> list[Row]:
    """A row per group: its statistics with their intervals, parameters, nats and sharing."""
    rows = []
    for section in sections:
        for group in section.groups:
            row: Row = {
                "suite": section.name, "group": group.label, "measure": section.measure, "runs": len(group.runs),
                "scored_runs": len(group.scored),
            }  # fmt: skip
            for name in STATISTICS:
                row |= _ends(name, group.statistics.get(name))
            known = [run for run in group.runs if run.parameters is not None]
            for name in ("stored", "active_per_task", "shared", "per_task"):
                row[f"{name}_parameters"] = known[0].parameters[name] if known and known[0].parameters else None
            row["seconds"] = _mean([run.seconds for run in known])
            row["mean_nats"] = _mean([float(run.nats.mean()) for run in group.runs if run.nats is not None])
            row["sharing"] = _mean([run.sharing for run in group.runs if run.sharing is not None])
            rows.append(row)
    return rows


def score_rows(sections: Sequence[Section]) -> list[Row]:
    """A row per run and task that counts: its final score."""
    return [
        {"suite": section.name, "group": group.label, "seed": run.seed, "task": task, section.measure: score}
        for section in sections
        for group in section.groups
        for run, scores in zip(group.scored, group.scores, strict=True)
        for task, score in zip(section.tasks, scores, strict=True)
    ]


def improvement_rows(sections: Sequence[Section]) -> list[Row]:
    """A row per pair of groups: how probably a run of the first beats one of the second on a task."""
    return [
        {"suite": section.name, "group": section.groups[one].label, "against": section.groups[other].label}
        | _ends("probability", interval)
        for section in sections
        for (one, other), interval in section.improvement.items()
    ]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a line per row under all their names; None is empty."""
    target = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(target, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({
            name: f"{value:.10g}" if isinstance(value, float) else value for name, value in row.items()
        })  # fmt: skip
    return target.getvalue()


def to_latex(sections: Sequence[Section]) -> str:
    r"""Write a ``tabular`` per section, with ``\usepackage{booktabs}``; a row per group."""
    parts = ["% \\usepackage{booktabs}"]
    for section in sections:
        groups = section.scored
        names = [name for name in STATISTICS if groups and name in groups[0].statistics]
        head = " & ".join(["", "runs", *(STATISTICS[name] for name in names)])
        lines = [
            " & ".join([_tex(group.label), str(len(group.scored)),
                        *(_tex_interval(group.statistics[name], section.digits) for name in names)]) + r" \\"
            for group in groups
        ]  # fmt: skip
        caption = f"% {section.name}: {section.measure}, 95 % stratified bootstrap intervals in brackets"
        few = [group.label for group in groups if group.statistics["iqm"].doubt]
        if few:
            caption += f"; of three runs or fewer, too narrow: {', '.join(few)}"
        parts.append("\n".join([
            " ".join(caption.split()), rf"\begin{{tabular}}{{lr{'c' * len(names)}}}", r"\toprule", head + r" \\",
            r"\midrule", *lines, r"\bottomrule", r"\end{tabular}",
        ]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def _tex_interval(interval: Interval, digits: int) -> str:
    point = f"${interval.point:.{digits}f}$"
    if interval.low is None or interval.high is None:
        return point
    return f"{point} [${interval.low:.{digits}f}$, ${interval.high:.{digits}f}$]"


def _ends(name: str, interval: Interval | None) -> Row:
    known = interval or (None, None, None)
    return {name: known[0], f"{name}_low": known[1], f"{name}_high": known[2]}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
