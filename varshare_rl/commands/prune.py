"""Copy a run without the parts of its residuals that are at their prior.

    python -m varshare_rl.prune run=runs/<folder> threshold=0.01

    run=<folder>       a run of network=varshare_lora or varshare (needed); it stays as it is
    threshold=0.01     units below it are dropped: nats per Gaussian, or a ratio with criterion=snr
    criterion=nats     or snr (signal to noise)
    out=null           the new run folder, with pruning.json; null: <run>_pruned
    checkpoint=last    or best
    episodes=1         of every task, on which the change of actions and values is measured
    device=auto        or cpu, cuda

All keys: docs/posterior.md, or --cfg job.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, DictConfig
from torch import Tensor

from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import TrainedAgent, load_agent, run_provenance
from varshare_rl.cli import run_command
from varshare_rl.commands.common import evaluation_engine, output_folder, read_options
from varshare_rl.config import Device
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.files import whole_folder, write_json
from varshare_rl.nn.actor import CategoricalActor
from varshare_rl.nn.critic import TwinQ
from varshare_rl.nn.layer import posterior_layers
from varshare_rl.nn.prune import Criterion, prune, report
from varshare_rl.nn.stochastic import posterior_mean
from varshare_rl.run.checkpoint import save_checkpoint
from varshare_rl.run.console import Console
from varshare_rl.run.episode_recording import EpisodeRecording, record
from varshare_rl.run_files import CONFIG_FILE, PRUNING_FILE


@dataclass
class PruneConfig:
    """Options of ``prune``."""

    run: str = MISSING
    "Folder of the run."
    threshold: float = bounded(0.01, least=0)
    "Least value of a unit that is kept: nats per Gaussian, or a ratio with `criterion=snr`."
    criterion: Criterion = Criterion.nats
    "Value of a unit: its nats, or its signal-to-noise ratio."
    checkpoint: str = "last"
    "Checkpoint of the run: `last` or `best`."
    out: str | None = None
    "The new run folder; null: `<run>_pruned`."
    episodes: int = bounded(1, least=1)
    "Episodes of every task, on whose states the change of the outputs is measured."
    device: Device = Device.auto
    "Device to compute on; `auto` takes CUDA if there is any."


def main(composed: DictConfig) -> None:
    """Write a pruned copy of the run's policy with ``pruning.json``; the run itself stays as it is."""
    options = read_options(composed, PruneConfig)
    run_dir = Path(options.run)
    named = run_dir if run_dir.name not in ("", "..") else run_dir.resolve()  # "." has no name of its own
    out = output_folder(options.out, named.with_name(f"{named.name}_pruned"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; give another folder: out=<folder>")
    agent = load_agent(run_dir, options.checkpoint, options.device)
    algorithm = agent.algorithm
    trained = algorithm.trained_modules().values()
    if not isinstance(algorithm, ActorCritic) or not any(any(posterior_layers(module)) for module in trained):
        raise UserError(
            f"{run_dir} was trained with network={agent.config.network.name}, which has no residuals to prune; "
            "give a run of network=varshare_lora or varshare"
        )
    result = prune_agent(agent, algorithm, options)
    write_pruned(agent, algorithm, result, run_dir, out)
    console = Console(agent.state["transitions"])
    console.message(
        f"kept {result['kept']:,} of {result['units']:,} units, {result['bytes_kept']:,} of "
        f"{result['bytes_dense']:,} bytes of posteriors; largest change of an action {_largest(result):.2g}"
    )
    console.message(f"written: {out / PRUNING_FILE}; evaluate with run={out}")


def prune_agent(agent: TrainedAgent, algorithm: ActorCritic, options: PruneConfig) -> dict[str, Any]:
    """Prune all trained networks in place and return the report."""
    with evaluation_engine(agent, options.episodes, agent.config.seed) as engine:
        recording = record(algorithm, engine, options.episodes)
    before = _mean_outputs(algorithm, recording)
    layers = {
        f"{name}.{path}": pruned
        for name, module in algorithm.trained_modules().items()
        for path, pruned in prune(module, options.threshold, options.criterion).items()
    }
    after = _mean_outputs(algorithm, recording)
    counted = recording.rows("counted")
    return {
        **report(layers),
        "changes": {
            task: {name: _change(before[name][i][counted[i]], after[name][i][counted[i]]) for name in before}
            for i, task in enumerate(agent.suite.task_names)
        },
        "threshold": options.threshold,
        "criterion": options.criterion.value,
        "run": options.run,
        "checkpoint": agent.checkpoint.name,
        "transitions": agent.state["transitions"],
        "seconds": agent.state["seconds"],
        "episodes_per_task": options.episodes,
        "conditions": run_provenance(agent.config, agent.suite, agent.device),
    }


def write_pruned(
    agent: TrainedAgent, algorithm: ActorCritic, result: dict[str, Any], run_dir: Path, out: Path
) -> None:
    """Write the pruned policy as a run folder of its own, with its configuration and ``pruning.json``."""
    saved = agent.state["algorithm"]
    tree = {name: agent.state[name] for name in ("transitions", "updates", "seconds")}
    tree["algorithm"] = {name: state for name, state in algorithm.policy_state().items() if name in saved}
    with whole_folder(out) as hidden:
        save_checkpoint(hidden, "last", agent.state["transitions"], tree)
        write_json(hidden / PRUNING_FILE, result)
        shutil.copyfile(run_dir / CONFIG_FILE, hidden / CONFIG_FILE)


@torch.no_grad()
def _mean_outputs(algorithm: ActorCritic, recording: EpisodeRecording) -> dict[str, Tensor]:
    """Compute deterministic actions (of Discrete ones probabilities) and values on means, ``[T, S * E, ...]``."""
    obs = recording.rows("obs").to(algorithm.spec.device)
    with posterior_mean(algorithm.actor), posterior_mean(algorithm.critic):
        policy: Any = algorithm.actor(obs, algorithm.task_ids)
        action = policy.log_probs.exp() if isinstance(algorithm.actor, CategoricalActor) else policy.mode()
        if isinstance(algorithm.critic, TwinQ):
            taken = recording.rows("action").to(obs.device)
            value = algorithm.critic(obs, taken, algorithm.task_ids).movedim(0, -1)
        else:
            value = algorithm.critic(obs, algorithm.task_ids)
    return {"action": action.cpu(), "value": value.cpu()}


def _change(before: Tensor, after: Tensor) -> dict[str, float]:
    difference = (after - before).double()
    return {"rms": float(difference.square().mean().sqrt()), "largest": float(difference.abs().max())}


def _largest(result: dict[str, Any]) -> float:
    return max(float(row["action"]["largest"]) for row in result["changes"].values())


def command() -> None:
    """Run the command line."""
    run_command("prune", main, PruneConfig)
