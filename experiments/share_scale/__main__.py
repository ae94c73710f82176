"""``python -m experiments.share_scale``: 500 synthetic adapters in batches of 50, merged in different ways.

Writes ``results.csv``, ``results.json`` (conditions) and ``results.png`` into this folder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from experiments.results import write_csv
from experiments.share_scale.measure import LAYERS, POLICIES, RANK, run
from varshare_rl.files import write_atomically, write_json
from varshare_rl.reporting.figures import grid_of_panels, legend_below, new_figure, plain_axes, styled, to_file
from varshare_rl.reporting.style import INK, PAGE, look
from varshare_rl.run.results import provenance


@styled
def draw(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Error, bytes, seconds and memory against the number of tasks."""
    panels = {
        "mean_error": "mean relative error",
        "stored_bytes": "stored bytes",
        "cpu_seconds": "CPU seconds for a batch",
        "peak_mb_above_start": "peak memory above start, MB",
    }
    figure = new_figure(PAGE, 5.0)
    axes = grid_of_panels(figure, len(panels), 2, "tasks")
    policies = list(dict.fromkeys(str(row["policy"]) for row in rows))
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for index, policy in enumerate(policies):
            own = [row for row in rows if row["policy"] == policy]
            seen = look(index)
            line = {"marker": seen.marker, "markersize": 3, **seen.line}
            axis.plot([row["tasks"] for row in own], [row[key] for row in own], label=policy, **line)
        if key == "stored_bytes":
            own = [row for row in rows if row["policy"] == rows[0]["policy"]]
            axis.plot(
                [row["tasks"] for row in own],
                [row["lora_bytes"] for row in own],
                ":",
                color=INK,
                label="LoRA adapters",
            )
            axis.set_yscale("log")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=None if key == "stored_bytes" else 0)
        plain_axes(axis, grid="y")
    legend_below(figure, *axes[1].get_legend_handles_labels())
    write_atomically(target, to_file(figure))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every policy in a process of its own, so that their peaks of memory are apart."""
    parser = argparse.ArgumentParser(prog="python -m experiments.share_scale", description=__doc__)
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the results go")
    given = parser.parse_args(arguments)
    if given.batch < 1 or given.tasks < given.batch or given.tasks % given.batch:
        parser.error(f"--tasks {given.tasks} must be a positive multiple of --batch {given.batch}")
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # for the processes to come
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    for policy in POLICIES:
        with ProcessPoolExecutor(1, mp_context=spawn) as alone:
            rows += alone.submit(run, policy, given.tasks, given.batch).result()
        print(
            {key: rows[-1][key] for key in ("policy", "k", "mean_error", "cpu_seconds", "stored_bytes")}, flush=True
        )
    write_csv(given.folder / "results.csv", list(rows[0]), rows)
    seconds = round(time.perf_counter() - begin, 1)
    about = {"tasks": given.tasks, "batch": given.batch, "layers": LAYERS, "rank": RANK, "seconds": seconds}
    write_json(given.folder / "results.json", provenance(about, seed=0) | {"threads": 1})
    draw(rows, given.folder / "results.png")


if __name__ == "__main__":
    main()
