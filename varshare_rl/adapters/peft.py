"""One task's policy in the files of the ``peft`` library: an adapter beside the network that all tasks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import nn

from varshare_rl.adapters.adapter import describe
from varshare_rl.adapters.agent import base_network, task_adapter
from varshare_rl.adapters.folder import read_adapter, write_adapter
from varshare_rl.adapters.lora import apply_lora
from varshare_rl.adapters.policy import TOLERANCE, TaskCritic, TaskPolicy, exact_products
from varshare_rl.errors import UserError
from varshare_rl.files import write_atomically
from varshare_rl.nn.actor import GaussianFamily
from varshare_rl.nn.plain import read_network, write_network

POSTERIOR_FILE = "varshare_posterior.safetensors"


def write_peft(folder: Path, policy: TaskPolicy, task: str) -> float:
    """Write every network's adapter folder and base, what LoRA has no room for, and instructions.

    Returns:
        the largest difference of an action from the agent's, see :meth:`TaskPolicy.check`.

    Raises:
        UserError: the files compute something else than the agent.
    """
    _write(folder, "actor", policy.actor.network, policy.index)
    for name, critic in policy.critics.items():
        _write(folder, name, critic.network, policy.index, *critic.units)
        _check_critic(folder, name, critic)
    side, moments = dict(policy.posterior), policy.normalizer.moments
    if policy.normalizer.enabled:
        side["observation.mean"] = moments.mean[policy.index].float()
        side["observation.std"] = policy.normalizer.std()[policy.index].float()
    if side:
        tensors = {key: tensor.cpu().contiguous() for key, tensor in side.items()}
        write_atomically(folder / POSTERIOR_FILE, save(tensors))
    write_atomically(folder / "README.md", _instructions(policy, task))
    acting = nn.Sequential(policy.input(), _read(folder, "actor"), policy.output())

    def run(obs: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        with torch.no_grad():
            return acting(torch.from_numpy(obs)).numpy()  # type: ignore[no-any-return]

    return policy.check(run)


def _write(folder: Path, name: str, network: nn.Module, task: int, *units: nn.Module) -> None:
    adapter = task_adapter(network, task)
    (folder / f"{name}_base").mkdir()
    write_network(folder / f"{name}_base", nn.Sequential(*base_network(network), *units))
    write_adapter(folder / name, adapter, describe(adapter, base_model=f"{name}_base"))


def _read(folder: Path, name: str) -> nn.Module:
    base, (adapter, _) = read_network(folder / f"{name}_base"), read_adapter(folder / name)
    lora = apply_lora(base, list(adapter))
    lora.load(folder / name, name)
    lora.activate(name)
    return base


@torch.no_grad()
def _check_critic(folder: Path, name: str, critic: TaskCritic) -> None:
    network = _read(folder, name)
    first = next(module for module in network.modules() if isinstance(module, nn.Linear))
    inputs = torch.randn(1000, first.in_features, generator=torch.Generator().manual_seed(0))
    with exact_products():
        found, wanted = network(inputs).squeeze(-1), critic.value(inputs)
    worst = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))
    if not worst <= TOLERANCE:
        raise UserError(f"values of the file {name} differ from the agent's by {worst:g}, more than {TOLERANCE:g}")


def _instructions(policy: TaskPolicy, task: str) -> str:
    spaces, normalizer = policy.spaces, policy.normalizer
    prepared, acting = [], ["x = obs"] if normalizer.enabled else ["x = obs.nan_to_num(0.0, 0.0, 0.0)"]
    if padding := normalizer.moments.mean.shape[1] - spaces.obs_size:
        acting.append(f"x = nn.functional.pad(x, (0, {padding}))  # to the size that all tasks have in common")
    if normalizer.enabled:
        bound = f"{normalizer.clip:g}"
        prepared.append(f'side = load_file("{POSTERIOR_FILE}")')
        acting += [
            'x = (x - side["observation.mean"]) / side["observation.std"]',
            f"x = x.nan_to_num(0.0).clamp(-{bound}, {bound})",
        ]
    if spaces.discrete:
        start = f" + {spaces.start}" if spaces.start else ""
        acting.append(f"return network(x)[:, :{spaces.action_size}].argmax(-1){start}")
    else:
        bound = "tanh()" if policy.family is GaussianFamily.tanh_gaussian else "clamp(-1, 1)"
        rounded = ".round()" if spaces.action_dtype.kind in "iu" else ""
        prepared.append(f"low, high = torch.tensor({list(spaces.low)}), torch.tensor({list(spaces.high)})")
        acting += [
            f"action = network(x)[:, :{spaces.action_size}].{bound}  # means; other outputs serve exploration",
            f"return (low + (high - low) / 2 * (action + 1)){rounded}",
        ]
    actions = "choices `[B]`" if spaces.discrete else f"actions `[B, {spaces.action_size}]` within its bounds"
    modules = "".join(f"    nn.{module},\n" for module in base_network(policy.actor.network))
    critics = posterior = ""
    if policy.critics:
        names = ", ".join(f"`{name}`" for name in policy.critics)
        critics = f"""
The critics {names} are built alike, from the modules in their `network.json`. They take observations as the
network here does, a critic of actions also the action between -1 and 1, joined to them, and give values in units
of the task's own rewards.
"""
    if policy.posterior:
        prior = " and the scale of their prior" if any("prior_scale" in key for key in policy.posterior) else ""
        posterior = f"""
The adapter is the posterior mean. `{POSTERIOR_FILE}` holds what LoRA has no room for: by network and
layer, `rho` of both factors (standard deviation `softplus(rho)`){prior}.
"""
    return f"""# Task {task}

`actor_base` is the network that all tasks share, `actor` this task's correction of it as a LoRA adapter. `act`
takes the environment's observations `[B, {spaces.obs_size}]` in float32 and gives its {actions}.

```python
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

base = nn.Sequential(
{modules})
base.load_state_dict(load_file("actor_base/network.safetensors"))
network = PeftModel.from_pretrained(base, "actor").eval()
{"".join(f"{line}{chr(10)}" for line in prepared)}

@torch.no_grad()
def act(obs):
{chr(10).join(f"    {line}" for line in acting)}
```
{critics}{posterior}"""
