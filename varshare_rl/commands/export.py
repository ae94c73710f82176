"""Write one task's policy into files for others: PyTorch, ONNX, or a LoRA adapter.

    python -m varshare_rl.export run=runs/<folder> task=reach-v3 format=torch

    run=<folder>       a run folder, also one of a sequence (needed)
    task=<name>        one of its tasks (needed)
    format=<name>      torch, onnx (the policy as a plain network) or peft (a LoRA adapter and its base) (needed)
    out=null           the new folder, or file.onnx; null: <run>/export/<task>_<format>
    checkpoint=last    or best
    critics=false      with format=peft: the critics' adapters too

All keys: docs/adapters.md, or --cfg job.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import MISSING, DictConfig
from torch import nn

from varshare_rl.adapters.agent import plain_paths, task_adapter, task_rho
from varshare_rl.adapters.policy import TaskPolicy, write_peft
from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import TrainedAgent, load_agent, run_provenance
from varshare_rl.cli import run_command
from varshare_rl.commands.common import NEEDS_RUN, make_folder, output_folder, read_options
from varshare_rl.config import Device, is_sequence
from varshare_rl.continual.sequence import load_sequence
from varshare_rl.errors import UserError
from varshare_rl.files import whole_folder, write_atomically, write_json
from varshare_rl.nn.critic import TwinQ, ValueNetwork
from varshare_rl.nn.plain import write_network, write_onnx
from varshare_rl.nn.progressive import Columns
from varshare_rl.nn.varshare_lora import VarShareLoRAConfig
from varshare_rl.ops.gaussian import inverse_softplus
from varshare_rl.registry import registered

ONNX_FILE = "policy.onnx"
#: Options that must be given, with examples.
NEEDED = {**NEEDS_RUN, "task": "<name>", "format": "peft, torch or onnx"}


class Format(Enum):
    """``peft``: the task's corrections as a LoRA adapter; ``torch``, ``onnx``: the policy with all folded in."""

    peft = "peft"
    torch = "torch"
    onnx = "onnx"


@dataclass
class ExportConfig:
    """Options of ``export``."""

    run: str = MISSING
    "Folder of the run, also that of a sequence of tasks."
    task: str = MISSING
    "Name of one of its tasks."
    format: Format = MISSING
    "Form of the policy: a PyTorch module, an ONNX graph, or a LoRA adapter and its base."
    out: str | None = None
    "The new folder, or file.onnx; null: `<run>/export/<task>_<format>`."
    checkpoint: str = "last"
    "Checkpoint of the run: `last` or `best`."
    critics: bool = False  # `critic` is a config group and cannot be a key
    "The critics' adapters too, with `format=peft`."


def main(composed: DictConfig) -> None:
    """Export as configured into a new folder."""
    options = read_options(composed, ExportConfig, NEEDED)
    if options.critics and options.format is not Format.peft:
        raise UserError(f"critics=true goes with format=peft only; format={options.format.value} holds the policy")
    check_format(options.format)
    run_dir = Path(options.run)
    if is_sequence(run_dir):
        policy = sequence_policy(options)
    else:
        agent = load_agent(run_dir, options.checkpoint, Device.cpu)
        policy = agent_policy(agent, options.task, options.format, options.critics)
    name = f"{options.task.replace('/', '_').replace(' ', '_')}_{options.format.value}"
    out = output_folder(options.out, run_dir / "export" / name)
    export(policy, options.task, options.format, out)
    print(f"written: {out}")


def check_format(format: Format) -> None:
    """Refuse a format whose packages are missing.

    Raises:
        UserError: names the package.
    """
    for package in ("onnx", "onnxscript") if format is Format.onnx else ():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"format=onnx needs the package {package}; pip install 'varshare_rl[onnx]'")


def agent_policy(agent: TrainedAgent, task: str, format: Format, critics: bool = False) -> TaskPolicy:
    """Return the policy of one of the tasks of a training run.

    Raises:
        UserError: there is no such task, or its networks have no such form.
    """
    index = task_index(task, agent.suite.task_names)
    algorithm = agent.algorithm
    if not isinstance(algorithm, ActorCritic):
        raise UserError(f"algorithm={agent.config.algorithm.name} has no policy that can be exported")
    name = agent.config.network.name
    if format is Format.peft and name != VarShareLoRAConfig.name:
        raise UserError(f"format=peft needs network=varshare_lora, and this run's is {name}; use torch or onnx")
    about = {
        "checkpoint": agent.checkpoint.name,
        "transitions": agent.state["transitions"],
        "conditions": run_provenance(agent.config, agent.suite, agent.device),
    }
    networks = critic_networks(algorithm.critic) if critics else {}
    rhos = {
        f"{network}.{key}": tensor
        for network, module in {"actor": algorithm.actor.network, **networks}.items()
        if format is Format.peft
        for key, tensor in task_rho(module, index).items()
    }
    return TaskPolicy(algorithm.actor, index, algorithm.normalizer, about, networks, rhos)


def sequence_policy(options: ExportConfig) -> TaskPolicy:
    """Return the policy that a learnt task of a sequence is acted with by now.

    Raises:
        UserError: there is no such sequence or task, it is not learnt yet, or its network has no such form.
    """
    if options.critics:
        raise UserError(f"critics=true, and {options.run} is a sequence of tasks, which keeps policies alone")
    sequence, checkpoint = load_sequence(Path(options.run), options.checkpoint, Device.cpu)
    names = [task.name for task in sequence.tasks]
    task = task_index(options.task, names)
    if task >= sequence.learnt:
        learnt = ", ".join(names[: sequence.learnt]) or "none yet"
        raise UserError(f"task {options.task} is not learnt yet; learnt are {learnt}")
    actor, normalizer = sequence.evaluator.policy(sequence.tasks[task], task)
    method, name = sequence.networks.method, sequence.config.method.name
    if isinstance(actor.network, Columns):
        raise UserError(f"a column of method={name} looks at those before it, and has no plain form to export")
    rhos = {}
    if options.format is Format.peft:
        if not sequence.config.method.low_rank:
            able = ", ".join(known for known, config in registered("method").items() if config.low_rank)
            raise UserError(f"method={name} has no adapters, which are in {able}; use format=torch or onnx")
        if not task_adapter(actor.network, 0):
            raise UserError(
                f"task {options.task} was learnt by the base itself and has no adapter; use format=torch or onnx"
            )
        paths = plain_paths(actor.network)
        for path, sigmas in method.sigma(task).items():
            for factor, sigma in zip("AB", sigmas, strict=True):
                rhos[f"actor.{paths[path]}.rho_{factor}"] = inverse_softplus(sigma)
    about = {
        "method": name,
        "checkpoint": checkpoint.name,
        "transitions": sequence.progress.transitions,
        "conditions": sequence.provenance(),
    }
    return TaskPolicy(actor, 0, normalizer, about, posterior=rhos)


def export(policy: TaskPolicy, task: str, format: Format, out: Path) -> None:
    """Write the files of one format into a new folder; ONNX also as a single file, if ``out`` ends with ``.onnx``.

    Raises:
        UserError: the policy's networks have no such form, or the folder is there already.
    """
    if out.exists():
        raise UserError(f"out={out} is there already; remove it or give another folder")
    if format is Format.onnx and out.suffix == ".onnx":
        with TemporaryDirectory() as folder:
            write_onnx(Path(folder) / ONNX_FILE, policy.plain(), policy.obs_size)
            make_folder(out.parent)
            write_atomically(out, (Path(folder) / ONNX_FILE).read_bytes())
        return
    about = {
        "task": task,
        "format": format.value,
        "observation_size": policy.obs_size,
        "action": "index of a choice" if policy.discrete else "each dimension in [-1, 1]",
        **policy.about,
    }
    with whole_folder(out) as target:
        if format is Format.peft:
            write_peft(target, policy, task)
        elif format is Format.torch:
            write_network(target, policy.plain())
        else:
            about["checked_with_onnxruntime"] = write_onnx(target / ONNX_FILE, policy.plain(), policy.obs_size)
        write_json(target / "export.json", about)


def task_index(task: str, names: Sequence[str]) -> int:
    """Return the number of a task. Raises UserError for an unknown one."""
    if task not in names:
        raise UserError(f"unknown task {task!r}; this run has {', '.join(names)}")
    return list(names).index(task)


def critic_networks(critic: nn.Module) -> dict[str, nn.Module]:
    """Return the networks of a critic by the names that their files have."""
    if isinstance(critic, TwinQ):
        return {f"critic_{index}": network for index, network in enumerate(critic.networks)}
    assert isinstance(critic, ValueNetwork)
    return {"critic": critic.network}


def command() -> None:
    """Run the command line."""
    run_command("export", main, ExportConfig)
