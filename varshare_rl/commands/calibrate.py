"""``python -m varshare_rl.calibrate run=runs/<folder>``: does the critic know how wrong it is?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import TrainedAgent, load_agent, run_provenance
from varshare_rl.cli import run_command
from varshare_rl.config import Device
from varshare_rl.errors import UserError
from varshare_rl.files import write_json
from varshare_rl.nn.layer import posterior_layers
from varshare_rl.reporting.reliability import draw_reliability
from varshare_rl.run.calibration import calibration, compare
from varshare_rl.run.console import Console
from varshare_rl.run.episode_recording import record


@dataclass
class CalibrateConfig:
    """Which run, which of its checkpoints (``last`` or ``best``), episodes of every task, and draws of weights."""

    run: str = MISSING
    checkpoint: str = "last"
    episodes: int = 10
    draws: int = 32
    device: Device = Device.auto
    seed: int | None = None  # of the starts; the run's own unless given


def main(composed: DictConfig) -> None:
    """Write ``calibration.json`` and ``calibration.png`` into the run folder."""
    if OmegaConf.is_missing(composed, "run"):
        raise UserError("run is missing; give the folder of a run: run=runs/<folder>")
    options = cast(CalibrateConfig, OmegaConf.to_object(composed))
    for name, value, least in (("episodes", options.episodes, 1), ("draws", options.draws, 2)):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    run_dir = Path(options.run)
    agent = load_agent(run_dir, options.checkpoint, options.device)
    algorithm = _with_value_units(agent, run_dir)
    config, suite = agent.config, agent.suite
    seed = config.seed if options.seed is None else options.seed
    engine = suite.make_engine(min(options.episodes, config.env.envs_per_task), seed, evaluation=True)
    try:
        recording = record(algorithm, engine, options.episodes)
    finally:
        engine.close()
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
    write_json(run_dir / "calibration.json", result)
    draw_reliability(result, run_dir / "calibration.png")
    console, mean = Console(agent.state["transitions"]), result["mean"]
    shown = ", ".join(f"{100 * float(level):g} %: {share:.3f}" for level, share in mean["coverage"].items())
    console.message(f"coverage at {shown}; calibration error {mean['calibration_error']:.3f}")
    console.message(f"written: {run_dir / 'calibration.json'}, {run_dir / 'calibration.png'}")


def _with_value_units(agent: TrainedAgent, run_dir: Path) -> ActorCritic:
    """The agent's actor-critic with the reward statistics that its values are in."""
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
    ConfigStore.instance().store(name="calibrate_schema", node=CalibrateConfig)
    run_command("calibrate", main)
