"""A sequence of tasks as it begins, and as its folder has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from varshare_rl.config import Device
from varshare_rl.continual.config import ContinualConfig, load_continual_config
from varshare_rl.continual.learner import SequenceRun
from varshare_rl.continual.parts import go_on_from, load_pretrained
from varshare_rl.errors import UserError


def build_sequence(config: ContinualConfig, run_dir: Path) -> SequenceRun:
    """A sequence before its first task, with networks as the agent has them that it goes on from, if there is one.

    Raises:
        UserError: the agent cannot be gone on from, or the tasks cannot be a sequence.
    """
    agent = load_pretrained(config, config.device)
    return SequenceRun(config if agent is None else go_on_from(config, agent), run_dir, agent)


def load_sequence(run_dir: Path, kind: str, device: Device) -> tuple[SequenceRun, Path]:
    """A sequence with the tasks that it has learnt by now, and the checkpoint that they are from.

    Raises:
        UserError: there is no such sequence or checkpoint, or this version cannot read it.
    """
    if kind != "last":
        raise UserError(
            f"checkpoint={kind}: {run_dir} is a sequence of tasks, which keeps its last checkpoint only"
        )
    sequence = build_sequence(replace(load_continual_config(run_dir / "config.yaml"), device=device), run_dir)
    return sequence, sequence.load()
