"""What a choice found: values per round, ratios with their spread, and how they are written down."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from varshare_rl.files import write_atomically, write_json
from varshare_rl.processor import processor

Values = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Goal:
    """A bound that a ratio or a value should keep."""

    bound: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"

    def met(self, value: float) -> bool:
        """Whether ``value`` keeps it."""
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True)
class Ratio:
    """``name`` divided by ``against``, round by round."""

    name: str
    against: str
    goal: Goal | None = None


@dataclass
class Section:
    """The result of one choice."""

    title: str
    unit: str
    values: Values
    ratios: list[Ratio] = field(default_factory=list)
    goals: dict[str, Goal] = field(default_factory=dict)  # on medians, by contender
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The section with all its numbers, for JSON."""
        return {
            "title": self.title,
            "unit": self.unit,
            "medians": [self._median(name) for name in self.values],
            "ratios": [self._ratio(ratio) for ratio in self.ratios],
            "notes": self.notes,
        }

    def _median(self, name: str) -> dict[str, Any]:
        return {"name": name, **_spread(self.values[name], self.goals.get(name)), "rounds": list(self.values[name])}

    def _ratio(self, ratio: Ratio) -> dict[str, Any]:
        pairs = zip(self.values[ratio.name], self.values[ratio.against], strict=True)
        spread = _spread([mine / other for mine, other in pairs], ratio.goal)
        return {"name": ratio.name, "against": ratio.against, **spread}


def _spread(values: Sequence[float], goal: Goal | None) -> dict[str, Any]:
    low, median, high = (float(np.quantile(values, share)) for share in (0.25, 0.5, 0.75))
    met = None if goal is None else goal.met(median)
    return {"median": median, "low": low, "high": high, "goal": goal and str(goal), "met": met}


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512": torch.backends.cpu.get_cpu_capability() == "AVX512",
        "memory_gib": round(memory, 1),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": threads or torch.get_num_threads(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "mujoco", "metaworld", "gymnasium")},
    }


def write(folder: Path, results: dict[str, Any]) -> None:
    """``results.json`` and the same as tables in ``results.md``; choices not in ``results`` stay."""
    path = folder / "results.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    merged = stored | results
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, merged)
    write_atomically(folder / "results.md", "\n".join(_page(merged)) + "\n")


def _page(results: dict[str, Any]) -> list[str]:
    lines = ["# Results of the benchmark", "", "Written by `python -m experiments.bench`; see README.md."]
    for choice, result in results.items():
        provenance = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
        lines += ["", f"## {choice}", "", f"{result['rounds']} rounds; {provenance}."]
        for section in result["sections"]:
            lines += ["", f"### {section['title']}", "", *table(section)]
    return lines


def table(section: dict[str, Any]) -> list[str]:
    """A section as markdown: ratios first, then medians with quartiles, then notes."""
    lines: list[str] = []
    if section["ratios"]:
        lines += ["| ratio | median (quartiles) | goal |", "|---|---|---|"]
        lines += [f"| {row['name']} / {row['against']} | {_numbers(row)} |" for row in section["ratios"]]
        lines.append("")
    lines += [f"| | {section['unit']}, median (quartiles) | goal |", "|---|---|---|"]
    lines += [f"| {row['name']} | {_numbers(row)} |" for row in section["medians"]]
    return lines + [line for note in section["notes"] for line in ("", note)]


def _numbers(row: dict[str, Any]) -> str:
    goal = "" if row["goal"] is None else f"{row['goal']}: {'met' if row['met'] else 'missed'}"
    return f"{_short(row['median'])} ({_short(row['low'])} to {_short(row['high'])}) | {goal}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
