"""``python -m varshare_rl.export run=runs/<folder> task=reach-v3 format=torch``: one task's policy in files."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from safetensors.torch import save
from torch import Tensor, nn

from varshare_rl.adapters.adapter import describe
from varshare_rl.adapters.agent import base_network, task_adapter, task_spread
from varshare_rl.adapters.folder import write_adapter
from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import TrainedAgent, load_agent, run_conditions
from varshare_rl.cli import run_command
from varshare_rl.config import Device
from varshare_rl.files import whole_folder, write_atomically, write_json
from varshare_rl.nn.critic import TwinQ, ValueNetwork
from varshare_rl.nn.merge import Normalize, merged_policy
from varshare_rl.nn.plain import write_network
from varshare_rl.nn.varshare_lora import VarShareLoRA
from varshare_rl.types import UserError

POSTERIOR_FILE = "varshare_posterior.safetensors"
ONNX_FILE = "policy.onnx"
#: Of the ONNX file's actions against PyTorch's, on random observations.
ONNX_TOLERANCE = 1e-5


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
    agent = load_agent(run_dir, options.checkpoint, Device.cpu)
    if options.task not in agent.suite.task_names:
        raise UserError(f"unknown task {options.task!r}; this run has {', '.join(agent.suite.task_names)}")
    name = f"{options.task.replace('/', '_')}_{options.format.value}"
    out = run_dir / "export" / name if options.out is None else Path(options.out)
    if out.exists():
        raise UserError(f"out={out} is there already; remove it or give another folder")
    with whole_folder(out) as folder:
        export(agent, options, folder)
    print(f"written: {out}")


def export(agent: TrainedAgent, options: ExportConfig, folder: Path) -> None:
    """Write the files of one format into a folder.

    Raises:
        UserError: the agent's networks have no such form.
    """
    task = list(agent.suite.task_names).index(options.task)
    algorithm = agent.algorithm
    if not isinstance(algorithm, ActorCritic):
        raise UserError(f"algorithm={agent.config.algorithm.name} has no policy that can be exported")
    about = {
        "task": options.task,
        "format": options.format.value,
        "checkpoint": agent.checkpoint.name,
        "transitions": agent.state["transitions"],
        "observation_size": algorithm.problem.obs_size,
        "action": "index of a choice" if algorithm.problem.discrete else "each dimension in [-1, 1]",
        "conditions": run_conditions(agent.config, agent.suite, agent.device),
    }
    if options.format is Format.peft:
        name = agent.config.network.name
        if name != VarShareLoRA.name:
            raise UserError(f"format=peft needs network=varshare_lora, and this run's is {name}; use torch or onnx")
        _write_peft(folder, algorithm, task, options)
    else:
        policy = task_policy(algorithm, task)
        if options.format is Format.torch:
            write_network(folder, policy)
        else:
            about["checked_with_onnxruntime"] = _write_onnx(folder / ONNX_FILE, policy, algorithm.problem.obs_size)
    write_json(folder / "export.json", about)


def task_policy(algorithm: ActorCritic, task: int) -> nn.Sequential:
    """Raw observations ``[B, F]`` of one task to its deterministic actions, on the posterior mean."""
    policy = merged_policy(algorithm.actor, task)
    normalize = _normalize(algorithm, task)
    return policy if normalize is None else nn.Sequential(normalize, *policy).eval()


def _normalize(algorithm: ActorCritic, task: int) -> Normalize | None:
    """The observation statistics of one task, None if observations are taken as they are."""
    normalizer = algorithm.normalizer
    if not normalizer.enabled:
        return None
    moments = normalizer.moments
    return Normalize(moments.mean[task].float(), moments.std()[task].float(), normalizer.clip)


def _write_peft(folder: Path, algorithm: ActorCritic, task: int, options: ExportConfig) -> None:
    """An adapter folder and its base for every network, what LoRA has no room for, and how to use them."""
    networks = {"actor": algorithm.actor.network, **(_critics(algorithm.critic) if options.critics else {})}
    side: dict[str, Tensor] = {}
    for name, network in networks.items():
        adapter, base = task_adapter(network, task), base_network(network)
        (folder / f"{name}_base").mkdir()
        write_network(folder / f"{name}_base", base)
        write_adapter(folder / name, adapter, describe(adapter, base_model=f"{name}_base"))
        side |= {f"{name}.{key}": tensor for key, tensor in task_spread(network, task).items()}
    normalize = _normalize(algorithm, task)
    if normalize is not None:
        side |= {"observation.mean": normalize.mean, "observation.std": normalize.std}
    write_atomically(
        folder / POSTERIOR_FILE, save({key: tensor.cpu().contiguous() for key, tensor in side.items()})
    )
    write_atomically(folder / "README.md", _instructions(algorithm, networks, normalize, options.task))


def _critics(critic: nn.Module) -> dict[str, nn.Module]:
    if isinstance(critic, TwinQ):
        return {f"critic_{index}": network for index, network in enumerate(critic.networks)}
    assert isinstance(critic, ValueNetwork)
    return {"critic": critic.network}


def _instructions(
    algorithm: ActorCritic, networks: dict[str, nn.Module], normalize: Normalize | None, task: str
) -> str:
    base = base_network(networks["actor"])
    modules = "".join(f"    nn.{module},\n" for module in base)
    inputs = "Observations go in as they are."
    if normalize is not None:
        inputs = (
            f"Observations go in as `((obs - mean) / std).clamp(-{normalize.clip:g}, {normalize.clip:g})` with "
            f"`observation.mean` and `observation.std` of `{POSTERIOR_FILE}`."
        )
    actions = algorithm.problem.action_size
    outputs = (
        f"The actor's {actions} outputs are logits; the policy takes the largest of those that the task allows."
        if algorithm.problem.discrete
        else f"The first {actions} of the actor's {2 * actions} outputs are means: the action is their `tanh`. "
        "The rest serve exploration."
    )
    critics = ", ".join(f"`{name}`" for name in networks if name != "actor")
    also = (
        f"The critics {critics} are built alike; a critic of actions takes observation and action joined.\n"
        if critics
        else ""
    )
    return f"""# Task {task}

`actor_base` is the network that all tasks share, `actor` this task's correction of it as a LoRA adapter.

```python
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

base = nn.Sequential(
{modules})
base.load_state_dict(load_file("actor_base/network.safetensors"))
network = PeftModel.from_pretrained(base, "actor").eval()
```

{inputs}
{outputs}
{also}
The adapter is the posterior mean. `{POSTERIOR_FILE}` holds what LoRA has no room for: by network and
layer, `rho` of both factors (standard deviation `softplus(rho)`) and the scale of their prior.
"""


def _need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"format=onnx needs the package {package}; pip install 'varshare_rl[onnx]'")


def _write_onnx(file: Path, policy: nn.Sequential, obs_size: int) -> bool:
    """Write an ONNX graph ``observation [batch, F]`` to ``action``; whether it could be compared with PyTorch.

    Raises:
        RuntimeError: onnxruntime computes other actions.
    """
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(64, obs_size, generator=generator)
    batch = torch.export.Dim("batch", min=1)
    names: dict[str, Any] = {"input_names": ["observation"], "output_names": ["action"]}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # packages that it does not find are not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter calls functions of torch that are to go
        program: Any = torch.onnx.export(
            policy, (obs,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},), **names
        )
    program.save(file)
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (actions,) = session.run(None, {"observation": obs.numpy()})
    with torch.no_grad():
        difference = (torch.from_numpy(actions) - policy(obs)).abs().max().item()
    if difference > ONNX_TOLERANCE:
        raise RuntimeError(f"onnxruntime's actions differ from PyTorch's by {difference:g}")
    return True


if __name__ == "__main__":
    ConfigStore.instance().store(name="export_schema", node=ExportConfig)
    run_command("export", main)
