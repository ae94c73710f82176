"""``python -m varshare_rl.export run=runs/<folder> task=reach-v3 format=torch``: one task's policy in files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from torch import nn

from varshare_rl.adapters.agent import plain_paths, task_adapter, task_rho
from varshare_rl.adapters.policy import TaskPolicy, write_peft
from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import load_agent, run_provenance
from varshare_rl.cli import run_command
from varshare_rl.config import Device, is_sequence
from varshare_rl.continual.loading import load_sequence
from varshare_rl.errors import UserError
from varshare_rl.files import whole_folder, write_json
from varshare_rl.nn.critic import TwinQ, ValueNetwork
from varshare_rl.nn.onnx_graph import write_onnx
from varshare_rl.nn.plain import write_network
from varshare_rl.nn.progressive import Columns
from varshare_rl.nn.varshare_lora import VarShareLoRAConfig
from varshare_rl.ops.gaussian import inverse_softplus
from varshare_rl.registry import registered

ONNX_FILE = "policy.onnx"


class Format(Enum):
    """``peft``: the task's corrections as a LoRA adapter; ``torch``, ``onnx``: the policy with all folded in."""

    peft = "peft"
    torch = "torch"
    onnx = "onnx"


@dataclass
class ExportConfig:
    """Which task of which run and checkpoint (``last`` or ``best``), in which format, to which folder."""

    run: str = MISSING
    task: str = MISSING
    format: Format = MISSING
    out: str | None = None  # default: <run>/export/<task>_<format>
    checkpoint: str = "last"
    critics: bool = False  # format=peft: the critics' adapters too; `critic` is a config group and cannot be a key


def main(composed: DictConfig) -> None:
    """Export as configured into a new folder."""
    for name, example in {"run": "runs/<folder>", "task": "<name>", "format": "peft, torch or onnx"}.items():
        if OmegaConf.is_missing(composed, name):
            raise UserError(f"{name} is missing; give {name}={example}")
    options = cast(ExportConfig, OmegaConf.to_object(composed))
    if options.critics and options.format is not Format.peft:
        raise UserError(f"critics=true goes with format=peft only; format={options.format.value} holds the policy")
    if options.format is Format.onnx:
        _need("onnx", "onnxscript")
    run_dir = Path(options.run)
    policy = sequence_policy(options) if is_sequence(run_dir) else agent_policy(options)
    name = f"{options.task.replace('/', '_').replace(' ', '_')}_{options.format.value}"
    out = run_dir / "export" / name if options.out is None else Path(options.out)
    if out.exists():
        raise UserError(f"out={out} is there already; remove it or give another folder")
    with whole_folder(out) as folder:
        export(policy, options, folder)
    print(f"written: {out}")


def agent_policy(options: ExportConfig) -> TaskPolicy:
    """The policy of one of the tasks of a training run.

    Raises:
        UserError: there is no such run or task, or its networks have no such form.
    """
    agent = load_agent(Path(options.run), options.checkpoint, Device.cpu)
    index = _index_of(options.task, agent.suite.task_names)
    algorithm = agent.algorithm
    if not isinstance(algorithm, ActorCritic):
        raise UserError(f"algorithm={agent.config.algorithm.name} has no policy that can be exported")
    name = agent.config.network.name
    if options.format is Format.peft and name != VarShareLoRAConfig.name:
        raise UserError(f"format=peft needs network=varshare_lora, and this run's is {name}; use torch or onnx")
    about = {
        "checkpoint": agent.checkpoint.name,
        "transitions": agent.state["transitions"],
        "conditions": run_provenance(agent.config, agent.suite, agent.device),
    }
    critics = _critics(algorithm.critic) if options.critics else {}
    spread = {
        f"{network}.{key}": tensor
        for network, module in {"actor": algorithm.actor.network, **critics}.items()
        if options.format is Format.peft
        for key, tensor in task_rho(module, index).items()
    }
    return TaskPolicy(algorithm.actor, index, algorithm.normalizer, about, critics, spread)


def sequence_policy(options: ExportConfig) -> TaskPolicy:
    """The policy that a learnt task of a sequence is acted with by now.

    Raises:
        UserError: there is no such sequence or task, it is not learnt yet, or its network has no such form.
    """
    if options.critics:
        raise UserError(f"critics=true, and {options.run} is a sequence of tasks, which keeps policies alone")
    sequence, checkpoint = load_sequence(Path(options.run), options.checkpoint, Device.cpu)
    names = [place.name for place in sequence.places]
    task = _index_of(options.task, names)
    if task >= sequence.learnt:
        learnt = ", ".join(names[: sequence.learnt]) or "none yet"
        raise UserError(f"task {options.task} is not learnt yet; learnt are {learnt}")
    actor, normalizer = sequence.evaluator.policy(sequence.places[task], task)
    method, name = sequence.networks.method, sequence.config.method.name
    if isinstance(actor.network, Columns):
        raise UserError(f"a column of method={name} looks at those before it, and has no plain form to export")
    spread = {}
    if options.format is Format.peft:
        if not sequence.config.method.low_rank:
            able = ", ".join(known for known, chosen in registered("method").items() if chosen.low_rank)
            raise UserError(f"method={name} has no adapters, which are in {able}; use format=torch or onnx")
        if not task_adapter(actor.network, 0):
            raise UserError(
                f"task {options.task} was learnt by the base itself and has no adapter; use format=torch or onnx"
            )
        paths = plain_paths(actor.network)
        for path, deviations in method.sigma(task).items():
            for factor, deviation in zip("AB", deviations, strict=True):
                spread[f"actor.{paths[path]}.rho_{factor}"] = inverse_softplus(deviation)
    about = {
        "method": name,
        "checkpoint": checkpoint.name,
        "transitions": sequence.progress.transitions,
        "conditions": sequence.provenance(),
    }
    return TaskPolicy(actor, 0, normalizer, about, spread=spread)


def export(policy: TaskPolicy, options: ExportConfig, folder: Path) -> None:
    """Write the files of one format into a folder.

    Raises:
        UserError: the policy's networks have no such form.
    """
    about = {
        "task": options.task,
        "format": options.format.value,
        "observation_size": policy.obs_size,
        "action": "index of a choice" if policy.discrete else "each dimension in [-1, 1]",
        **policy.about,
    }
    if options.format is Format.peft:
        write_peft(folder, policy, options.task)
    elif options.format is Format.torch:
        write_network(folder, policy.plain())
    else:
        about["checked_with_onnxruntime"] = write_onnx(folder / ONNX_FILE, policy.plain(), policy.obs_size)
    write_json(folder / "export.json", about)


def _index_of(task: str, names: Sequence[str]) -> int:
    if task not in names:
        raise UserError(f"unknown task {task!r}; this run has {', '.join(names)}")
    return list(names).index(task)


def _critics(critic: nn.Module) -> dict[str, nn.Module]:
    if isinstance(critic, TwinQ):
        return {f"critic_{index}": network for index, network in enumerate(critic.networks)}
    assert isinstance(critic, ValueNetwork)
    return {"critic": critic.network}


def _need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"format=onnx needs the package {package}; pip install 'varshare_rl[onnx]'")


def command() -> None:
    """Run the command line."""
    ConfigStore.instance().store(name="export_schema", node=ExportConfig)
    run_command("export", main)
