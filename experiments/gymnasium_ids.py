"""Trains, stops and resumes an agent on every environment of Gymnasium, and writes ``docs/gymnasium.md``.

    python -m experiments.gymnasium_ids

An environment passes if a run in two halves ends with the same tensors and metrics, to the bit, as a run in one.
What is refused is tried again with the wrapper that the error line names.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import torch

from varshare_rl.cli import compose
from varshare_rl.commands.train import run_config
from varshare_rl.errors import UserError
from varshare_rl.run.checkpoint import TENSOR_FILE, find_checkpoint

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gymnasium.md"
FAMILIES = {"classic_control": "Classic control", "box2d": "Box2D", "mujoco": "MuJoCo", "toy_text": "Toy text"}
FLATTEN = "gymnasium.wrappers:FlattenObservation"
HALF = 160
OPTIONS = (
    "env=gymnasium", "env.horizon=40", "env.envs_per_task=2", "env.workers=1", "network.hidden=[8]", "device=cpu",
    "log.every=40", "log.quiet=true", "evaluate.every=160", "evaluate.episodes=2", "observe.every=0",
)  # fmt: skip
ALGORITHMS = {
    "ppo": ("algorithm=ppo", "algorithm.rollout_transitions_per_task=60", "algorithm.epochs=1"),
    "sac": (
        "algorithm=sac", "algorithm.start_transitions_per_task=40", "algorithm.batch_per_task=8",
        "algorithm.replay_capacity_per_task=1000", "algorithm.updates_per_transition_per_task=0.1",
    ),
}  # fmt: skip

HEAD = """# Gymnasium's environments

What `env=gymnasium env.ids=[<id>]` does with the environments of Gymnasium {version}: each is trained once without
a stop, and once stopped half way and resumed. "Bitwise" says that both end with the same parameters, moments,
replay or rollout, random states and metrics, to the bit. What is refused is refused in the line shown. Made by
`python -m experiments.gymnasium_ids`, with torch {torch} on a CPU; SAC where actions are continuous, PPO elsewhere.

Environments are tried out at the start of a run: one short episode is played in a used and in a new environment.
Where they differ, as in the walkers of Box2D, whose physical world outlives a reset, a new environment is made for
every episode, and the run says so once. Environments that draw from the global generators of numpy or Python get
these for themselves. Where not even new environments agree, the run says that it cannot be repeated, and begins new
episodes when it is resumed.
"""


def ids() -> Iterator[tuple[str, str]]:
    """Yield family and id; of MuJoCo's the versions that need no other package."""
    for name, spec in list(gymnasium.registry.items()):  # making one registers others
        family = str(spec.entry_point).partition("gymnasium.envs.")[2].partition(".")[0].partition(":")[0]
        if family in FAMILIES and not (family == "mujoco" and (spec.version or 0) < 4):
            yield family, name


def try_out(env_id: str, folder: Path, more: Sequence[str]) -> tuple[str, str]:
    """Return the algorithm and "bitwise", or what is wrong. Raises UserError where the id is refused."""
    try:
        return "SAC", halves(env_id, folder, "sac", more)
    except UserError as error:
        if "algorithm=sac needs Box actions" not in str(error):
            raise
    return "PPO", halves(env_id, folder, "ppo", more)


def halves(env_id: str, folder: Path, algorithm: str, more: Sequence[str]) -> str:
    """Train in one and in two parts and compare."""

    def train(*given: str) -> Path:
        overrides = list({item.partition("=")[0]: item for item in given}.values())
        return run_config(compose("train", overrides), overrides)

    options = (*OPTIONS, *ALGORITHMS[algorithm], *more, f"env.ids=['{env_id}']")
    whole = train(*options, f"total_transitions={2 * HALF}", f"run_dir='{folder / 'whole'}'")
    parts = train(*options, f"total_transitions={HALF}", f"run_dir='{folder / 'parts'}'")
    train(f"resume='{parts}'", f"total_transitions={2 * HALF}")
    tensors = [(find_checkpoint(run) / TENSOR_FILE).read_bytes() for run in (whole, parts)]
    if tensors[0] != tensors[1]:
        return "**other tensors**"
    return "bitwise" if metrics(whole) == metrics(parts) else "**other metrics**"


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` without what the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    clock = ("seconds", "time/transitions_per_second", "time/share_")
    return [{key: value for key, value in line.items() if not key.startswith(clock)} for line in lines]


def row(env_id: str, more: Sequence[str] = ()) -> list[str]:
    """Return the cells of an id's row."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return [env_id, *try_out(env_id, Path(folder), more)]
        except UserError as error:
            line = str(error)
    if FLATTEN in line and not more:
        shown, algorithm, outcome = row(env_id, [f"env.wrappers=['{FLATTEN}']"])
        return [shown, algorithm, f"{outcome}, with `env.wrappers=[{FLATTEN}]`; without it refused: {brief(line)}"]
    return [env_id, "", f"refused: {brief(line)}"]


def brief(line: str) -> str:
    """Return an error line up to its cure."""
    return line.replace("|", "\\|").partition(";")[0][:200]


def main(chosen: Sequence[str]) -> None:
    """Write the page, or print the rows of the ids that are given."""
    torch.set_num_threads(1)
    rows: dict[str, list[list[str]]] = {family: [] for family in FAMILIES}
    for family, env_id in ids():
        if not chosen or env_id in chosen:
            rows[family].append(row(env_id))
            print(*rows[family][-1], sep=" | ", flush=True)
    if chosen:
        return
    page = [HEAD.format(version=gymnasium.__version__, torch=torch.__version__.partition("+")[0])]
    for family, title in FAMILIES.items():
        cells = ["| id | algorithm | stopped and resumed |", "|---|---|---|"]
        cells += ["| " + " | ".join(entry) + " |" for entry in rows[family]]
        page.append("\n".join([f"## {title}", "", *cells, ""]))
    PAGE.write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
