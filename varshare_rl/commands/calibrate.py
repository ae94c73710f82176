"""Check the critic's posterior: how often its intervals contain the returns that follow.

    python -m varshare_rl.calibrate run=runs/<folder>

    run=<folder>       a run of network=varshare_lora or varshare (needed); calibration.json, .png are written there
    episodes=10        of every task
    draws=32           of the critic's weights
    checkpoint=last    or best
    device=auto        or cpu, cuda
    seed=null          of the episodes' starts; null: the run's own

All keys: docs/posterior.md, or --cfg job.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig

from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import TrainedAgent, load_agent, run_provenance
from varshare_rl.cli import run_command
from varshare_rl.commands.common import evaluation_engine, evaluation_seed, read_options
from varshare_rl.config import Device
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.files import write_atomically, write_json
from varshare_rl.nn.layer import posterior_layers
from varshare_rl.reporting.calibration_figure import calibration_figure
from varshare_rl.reporting.figures import to_file
from varshare_rl.run.calibration import calibration, compare
from varshare_rl.run.console import Console
from varshare_rl.run.episode_recording import record


@dataclass
class CalibrateConfig:
    """Options of ``calibrate``."""

    run: str = MISSING
    "Folder of the run."
    checkpoint: str = "last"
    "Checkpoint of the run: `last` or `best`."
    episodes: int = bounded(10, least=1)
    "Episodes of every task."
    draws: int = bounded(32, least=2)
    "Draws of the critic's weights."
    device: Device = Device.auto
    "Device to compute on; `auto` takes CUDA if there is any."
    seed: int | None = bounded(None, least=0, most=2**32 - 1)
    "Seed of the episodes' starts; null: the run's own."


def main(composed: DictConfig) -> None:
    """Write ``calibration.json`` and ``calibration.png`` into the run folder."""
    options = read_options(composed, CalibrateConfig)
    run_dir = Path(options.run)
    agent = load_agent(run_dir, options.checkpoint, options.device)
    result = calibrate_agent(agent, run_dir, options)
    write_json(run_dir / "calibration.json", result)
    write_atomically(run_dir / "calibration.png", to_file(calibration_figure(result)))
    console, mean = Console(agent.state["transitions"]), result["mean"]
    shown = ", ".join(f"{100 * float(level):g} %: {share:.3f}" for level, share in mean["coverage"].items())
    console.message(f"coverage at {shown}; calibration error {mean['calibration_error']:.3f}")
    console.message(f"written: {run_dir / 'calibration.json'}, {run_dir / 'calibration.png'}")


def calibrate_agent(agent: TrainedAgent, run_dir: Path, options: CalibrateConfig) -> dict[str, Any]:
    """Compare the critic's predictions with what an agent earns in recorded episodes.

    Raises:
        UserError: its critic has no posterior, or its checkpoint no reward statistics.
    """
    algorithm = _with_value_units(agent, run_dir)
    config, suite = agent.config, agent.suite
    seed = evaluation_seed(agent, options.seed)
    with evaluation_engine(agent, options.episodes, seed) as engine:
        recording = record(algorithm, engine, options.episodes)
    log_alpha = agent.state["algorithm"].get("log_alpha")
    comparison = compare(
        algorithm, recording, config.algorithm.discount, options.draws, config.elbo.temperature,
        None if log_alpha is None else log_alpha.exp() * algorithm.critic.value_std().squeeze(1).cpu(),
    )  # fmt: skip
    result = calibration(comparison, suite.task_names)
    result["conditions"] = {
        **run_provenance(config, suite, agent.device),
        "evaluation_seed": seed,
        "episodes_per_task": options.episodes,
        "draws": options.draws,
        "discount": config.algorithm.discount,
        "temperature": config.elbo.temperature,
        "kl_weight": config.elbo.kl_weight,
        "checkpoint": agent.checkpoint.name,
    }
    return result


def _with_value_units(agent: TrainedAgent, run_dir: Path) -> ActorCritic:
    """Return the agent's actor-critic with the reward statistics that its values are in."""
    algorithm = agent.algorithm
    if not isinstance(algorithm, ActorCritic) or not any(posterior_layers(algorithm.critic)):
        raise UserError(
            f"{run_dir} was trained with network={agent.config.network.name}, whose critic has no posterior "
            "to check; give a run of network=varshare_lora or varshare"
        )
    if "reward_scaler" not in agent.state["algorithm"]:
        raise UserError(
            f"{agent.checkpoint} has no reward statistics, which values are in units of: it goes back to a best "
            "checkpoint of an earlier version; give checkpoint=last, or prune from that"
        )
    return algorithm


def command() -> None:
    """Run the command line."""
    run_command("calibrate", main, CalibrateConfig)
