"""The page of runs side by side: one HTML file that needs no other and no network."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from varshare_rl.errors import missing_extra
from varshare_rl.reporting.comparison import STATISTICS, Section, word
from varshare_rl.reporting.comparison_figures import Looks

TEMPLATE = Path(__file__).with_name("report.html")
#: What is seen in a figure, and how to read it.
CAPTIONS = {
    "learning": "Interquartile mean over tasks and runs, as far as all runs of a group go. Seconds are those of "
    "the run with its evaluations, and comparable only on the same, equally busy machine.",
    "tasks_learning": "Every task's mean over runs.",
    "aggregates": "Interquartile mean: the mean of the middle half of all runs' and tasks' scores. Worst tasks: "
    "those with the least means over runs, each group its own.",
    "tasks": "Every task's mean over runs, at the moment in the title.",
    "profiles": "How many of all runs and tasks score above a threshold: a curve that is higher everywhere is "
    "better everywhere; where curves cross, neither is.",
    "improvement": "How probably a run of the first group scores above one of the second on a task drawn at "
    "random, ties counting half. An interval that holds 0.5 decides nothing. It says how often, not by how much.",
    "parameters": "Parameters of all trained networks: stored in all, and used in one task's forward pass.",
    "sharing": "Nats: how far a task's residuals have moved from their prior. Sharing: 1 if all tasks have the "
    "same weights. Dots are runs.",
}


def page(
    sections: Sequence[Section],
    looks: Looks,
    pictures: Sequence[Mapping[str, bytes]],
    left_out: Sequence[str],
    given: Sequence[str],
) -> str:
    """Return the page; ``pictures`` has the figures of every section as SVG, ``given`` the words of the command.

    Raises:
        UserError: Jinja is not installed.
    """
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise missing_extra("report.html needs Jinja", "report") from error
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        sections=[
            {
                "section": section,
                "anchor": name,
                "pictures": {figure: _data_uri(drawn) for figure, drawn in made.items()},
                "statistics": {
                    key: words
                    for key, words in STATISTICS.items()
                    if any(key in group.statistics for group in section.groups)
                },
                "conditions": conditions(section),
            }
            for section, name, made in zip(sections, file_names(sections), pictures, strict=True)
        ],
        captions=CAPTIONS,
        looks=looks,
        left_out=left_out,
        given=" ".join(given),
        runs=sum(len(group.runs) for section in sections for group in section.groups),
    )


def file_names(sections: Sequence[Section]) -> list[str]:
    """Return a name for the files of every section, each another."""
    names = [
        re.sub(r"[^\w-]+", "_", section.name, flags=re.ASCII).strip("_")[:40] or "runs" for section in sections
    ]
    return [name if names.count(name) == 1 else f"{name}_{index + 1}" for index, name in enumerate(names)]


def conditions(section: Section) -> tuple[dict[str, str], list[str], list[list[str]]]:
    """Return the conditions that all runs have in common, the names of the others, and a row of those per run."""
    rows: list[dict[str, Any]] = []
    for group in section.groups:
        for run in group.runs:
            state = "finished" if run.scores is not None else "not finished"
            rows.append(
                {"group": group.label, "seed": run.seed, "folder": str(run.folder), "state": state}
                | {"transitions": f"{run.transitions:,}", "seconds": f"{run.seconds:,.0f}"}
                | {f"{name} parameters": f"{count:,}" for name, count in (run.parameters or {}).items()}
                | {"evaluate.episodes": run.options["evaluate.episodes"]}
                | {name: word(value) for name, value in run.conditions.items() if name != "seed"}
            )
    names = list(dict.fromkeys(name for row in rows for name in row))
    always = ("group", "seed", "folder", "state", "transitions", "seconds")
    own = [name for name in names if name in always or len({str(row.get(name, "")) for row in rows}) > 1]
    common = {name: str(rows[0][name]) for name in names if name not in own}
    return common, own, [[str(row.get(name, "")) for name in own] for row in rows]


def _data_uri(picture: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
