"""Write one task's policy into files for others: PyTorch, ONNX, or a LoRA adapter.

    python -m varshare_rl.export run=runs/<folder> task=reach-v3 format=torch

    run=<folder>       a run folder, also one of a sequence (needed)
    task=<name>        one of its tasks (needed)
    format=<name>      torch, onnx (the policy as a program) or peft (a LoRA adapter and its base) (needed)
    out=null           the new folder, or file.pt2, file.onnx; null: <run>/export/<task>_<format>
    checkpoint=last    or best
    critics=false      with format=peft: the critics' adapters too

The policy takes the task's own observations, any number of rows, and gives its own actions within its bounds.
What is written is compared with the agent on 1000 observations; torch and onnx run without varshare_rl.

All keys: docs/export.md, or --cfg job.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import MISSING, DictConfig
from torch import Tensor, nn

from varshare_rl.adapters.agent import plain_paths, task_adapter, task_rho
from varshare_rl.adapters.peft import write_peft
from varshare_rl.adapters.policy import TaskCritic, TaskPolicy
from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import TrainedAgent, load_agent, run_provenance
from varshare_rl.cli import run_command
from varshare_rl.commands.common import NEEDS_RUN, make_folder, output_folder, read_options
from varshare_rl.config import Device, is_sequence
from varshare_rl.continual.sequence import load_sequence
from varshare_rl.envs.spaces import TaskSpaces
from varshare_rl.errors import UserError, missing_extra
from varshare_rl.files import to_json, whole_folder, write_atomically, write_json
from varshare_rl.nn.critic import TwinQ, ValueNetwork
from varshare_rl.nn.program import read_onnx, read_pt2, trace, write_onnx, write_pt2
from varshare_rl.nn.stochastic import posterior_mean
from varshare_rl.nn.varshare_lora import VarShareLoRAConfig
from varshare_rl.ops.gaussian import inverse_softplus
from varshare_rl.registry import registered

#: Files that hold a whole policy.
PROGRAMS = {"torch": "policy.pt2", "onnx": "policy.onnx"}
#: Options that must be given, with examples.
NEEDED = {**NEEDS_RUN, "task": "<name>", "format": "peft, torch or onnx"}


class Format(Enum):
    """``peft``: the task's corrections as a LoRA adapter; ``torch``, ``onnx``: the policy as a program."""

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
    "Form of the policy: a program of `torch.export`, an ONNX graph, or a LoRA adapter and its base."
    out: str | None = None
    "The new folder, or file.pt2 or file.onnx; null: `<run>/export/<task>_<format>`."
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
            raise missing_extra(f"format=onnx needs the package {package}", "onnx")


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
    found = task_critics(agent, algorithm, index) if critics else {}
    networks = {"actor": algorithm.actor.network, **{key: critic.network for key, critic in found.items()}}
    rhos = {
        f"{network}.{key}": tensor
        for network, module in networks.items()
        if format is Format.peft
        for key, tensor in task_rho(module, index).items()
    }
    spaces = agent.suite.native_spaces(index)
    return TaskPolicy(algorithm.actor, index, spaces, algorithm.normalizer, about, found, rhos)


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
    chosen = sequence.tasks[task]
    actor, normalizer = sequence.evaluator.policy(chosen, task)
    method, name = sequence.networks.method, sequence.config.method.name
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
    spaces = chosen.suite.native_spaces(chosen.index)
    return TaskPolicy(actor, 0, spaces, normalizer, about, posterior=rhos)


def export(policy: TaskPolicy, task: str, format: Format, out: Path) -> None:
    """Write the files of one format into a new folder, or a program as a single file if ``out`` ends as such do.

    Raises:
        UserError: the policy's networks have no such form, there is something at ``out`` already, or the files
            compute something else than the agent.
    """
    if out.exists():
        raise UserError(f"out={out} is there already; remove it or give another folder")
    endings = {Path(file).suffix: name for name, file in PROGRAMS.items()}
    alone = out.suffix in endings
    if alone and endings[out.suffix] != format.value:
        raise UserError(f"out={out} is a file of format={endings[out.suffix]}, and format={format.value} was given")
    policy = policy.on_cpu()
    about = {"task": task, "format": format.value, **describe_spaces(policy.spaces), **policy.about}
    with TemporaryDirectory() if alone else whole_folder(out) as target:
        folder = Path(target)
        checked = write_policy(folder, policy, task, format, about)
        if alone:
            make_folder(out.parent)
            write_atomically(out, (folder / PROGRAMS[format.value]).read_bytes())
        else:
            about["largest_difference"] = checked
            write_json(folder / "export.json", about)


def write_policy(
    folder: Path, policy: TaskPolicy, task: str, format: Format, about: Mapping[str, Any]
) -> float | None:
    """Write a policy; returns its largest difference from the agent, None where nothing here can run it."""
    if format is Format.peft:
        return write_peft(folder, policy, task)
    program, file = trace(policy.module(), policy.spaces.obs_size), folder / PROGRAMS[format.value]
    write, read = (write_pt2, read_pt2) if format is Format.torch else (write_onnx, read_onnx)
    write(file, program, {"export.json": to_json(about)})
    run = read(file)
    return None if run is None else policy.check(run)


def describe_spaces(spaces: TaskSpaces) -> dict[str, Any]:
    """Return sizes, bounds and types of observations and actions."""
    action: dict[str, Any] = {"choices": spaces.choices, "start": spaces.start, "dtype": "int64"}
    if not spaces.discrete:
        action = {"size": spaces.action_size, "low": spaces.low, "high": spaces.high, "dtype": spaces.dtype}
    return {"observation": {"size": spaces.obs_size, "dtype": "float32"}, "action": action}


def task_index(task: str, names: Sequence[str]) -> int:
    """Return the number of a task. Raises UserError for an unknown one."""
    if task not in names:
        raise UserError(f"unknown task {task!r}; this run has {', '.join(names)}")
    return list(names).index(task)


def task_critics(agent: TrainedAgent, algorithm: ActorCritic, task: int) -> dict[str, TaskCritic]:
    """Return the critics of a task by the names that their files have.

    Raises:
        UserError: the checkpoint does not say what its values are in units of.
    """
    critic, scaler = algorithm.critic, algorithm.reward_scaler
    factors = scaler.factors()
    if factors is not None and "reward_scaler" not in agent.state["algorithm"]:
        raise UserError(
            f"{agent.checkpoint} has no reward statistics, which values are in units of: it goes back to a best "
            "checkpoint of an earlier version; give checkpoint=last, or leave critics out"
        )
    factor = 1.0 if factors is None else float(factors[task])
    ids = torch.tensor([task])

    def value(head: int, network: nn.Module, inputs: Tensor) -> Tensor:
        with posterior_mean(network):
            return critic.read(head, network(inputs.unsqueeze(0), ids), ids)[0] / factor

    if isinstance(critic, TwinQ):
        networks = {f"critic_{head}": network for head, network in enumerate(critic.networks)}
    else:
        assert isinstance(critic, ValueNetwork)
        networks = {"critic": critic.network}
    return {
        name: TaskCritic(network, critic.units(head, task, factor), partial(value, head, network))
        for head, (name, network) in enumerate(networks.items())
    }


def command() -> None:
    """Run the command line."""
    run_command("export", main, ExportConfig)
