"""Draw what the tasks of a run share, from a checkpoint: sharing.json and its figures.

    python -m varshare_rl.report sharing run=runs/<folder>

    run=<folder>       a run folder (needed)
    checkpoint=last    or best
    out=null           the folder for the report; null: <run>/report_sharing

What the measures mean: docs/sharing.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from varshare_rl.assemble import TrainedAgent, load_agent
from varshare_rl.commands.common import ReportConfig, make_folder, output_folder
from varshare_rl.config import Device
from varshare_rl.errors import UserError
from varshare_rl.files import write_atomically, write_json
from varshare_rl.registry import register
from varshare_rl.run.sharing import sharing_document
from varshare_rl.run.sharing_monitor import latest_observation


@register("report", "sharing")
@dataclass
class SharingReportConfig(ReportConfig):
    """Options of ``report sharing``."""

    run: str = MISSING
    "Folder of the run."
    checkpoint: str = "last"
    "Checkpoint of the run: `last` or `best`."
    out: str | None = None
    "Folder for the report; null: `<run>/report_sharing`."

    def build(self, folders: Sequence[str]) -> None:
        """Write ``sharing.json`` and its figures for a checkpoint."""
        run_dir = Path(self.run)
        out = output_folder(self.out, run_dir / "report_sharing")
        document = agent_sharing(load_agent(run_dir, self.checkpoint, Device.cpu), run_dir)
        write_figures(out, document)
        print(f"written: {out}")


def agent_sharing(agent: TrainedAgent, run_dir: Path) -> dict[str, Any]:
    """Measure what the tasks of an agent share; gradients are as the run last observed them.

    Raises:
        UserError: its weights are the same for all tasks.
    """
    transitions = agent.state["transitions"]
    document = sharing_document(agent.algorithm.trained_modules(), agent.suite.task_names, transitions)
    if not document["layers"]:
        raise UserError(
            f"{run_dir} has network={agent.config.network.name}, whose weights are the same for all tasks: there "
            "is no sharing to report; give a run of another network"
        )
    observed = latest_observation(run_dir, transitions)
    if observed is not None:
        document["conflict"] = observed["conflict"]
    return document


def write_figures(out: Path, document: dict[str, Any]) -> None:
    """Write the document and a PNG for every figure that it has numbers for."""
    from varshare_rl.reporting.figures import to_file  # takes a while to import: after what can be wrong
    from varshare_rl.reporting.sharing_figures import sharing_figures

    make_folder(out)
    for name, figure in sharing_figures(document).items():
        write_atomically(out / f"{name}.png", to_file(figure))
    write_json(out / "sharing.json", document)
