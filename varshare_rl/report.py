"""``python -m varshare_rl.report sharing run=runs/<folder>``: figures and numbers from what runs left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from varshare_rl.assemble import load_agent
from varshare_rl.cli import fail, run_command
from varshare_rl.config import Device
from varshare_rl.files import write_atomically, write_json
from varshare_rl.run.observatory import latest_observation
from varshare_rl.run.sharing import sharing_document
from varshare_rl.types import UserError


@dataclass
class SharingReportConfig:
    """Which run, which of its checkpoints (``last`` or ``best``), and the folder for the report."""

    run: str = MISSING
    checkpoint: str = "last"
    out: str | None = None  # default: <run>/report_sharing


def report_sharing(composed: DictConfig) -> None:
    """Write ``sharing.json`` and its figures for a checkpoint; gradients as the run last observed them."""
    if OmegaConf.is_missing(composed, "run"):
        raise UserError("run is missing; give the folder of a run: run=runs/<folder>")
    options = cast(SharingReportConfig, OmegaConf.to_object(composed))
    run_dir = Path(options.run)
    out = run_dir / "report_sharing" if options.out is None else Path(options.out)
    agent = load_agent(run_dir, options.checkpoint, Device.cpu)
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
    write_figures(out, document)
    print(f"written: {out}")


def write_figures(out: Path, document: dict[str, Any]) -> None:
    """Write the document and a PNG for every figure that it has numbers for."""
    from varshare_rl.reporting.figures import to_png  # takes a while to import: after what can be wrong
    from varshare_rl.reporting.sharing_figures import sharing_figures

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out} ({error.strerror}); give another out") from error
    for name, figure in sharing_figures(document).items():
        write_atomically(out / f"{name}.png", to_png(figure))
    write_json(out / "sharing.json", document)


class Report(NamedTuple):
    """A report: its options and what makes it. ``configs/report_<name>.yaml`` names ``report_<name>_schema``."""

    options: type
    make: Callable[[DictConfig], None]


#: What ``python -m varshare_rl.report`` can be asked for, by its first word.
REPORTS = {"sharing": Report(SharingReportConfig, report_sharing)}


def main() -> None:
    """Take the first word of the command line for the report's name, and hand the rest to Hydra."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in REPORTS:
        given = f"unknown report {name!r}" if name else "no report given"
        fail(f"{given}; there is {', '.join(REPORTS)}: python -m varshare_rl.report sharing run=runs/<folder>")
    del sys.argv[1]
    ConfigStore.instance().store(name=f"report_{name}_schema", node=REPORTS[name].options)
    run_command(f"report_{name}", REPORTS[name].make)


if __name__ == "__main__":
    main()
