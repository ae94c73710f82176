"""One task's policy: as a plain network, or in files as an adapter of the network that all tasks share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from varshare_rl.adapters.adapter import describe
from varshare_rl.adapters.agent import base_network, task_adapter
from varshare_rl.adapters.folder import write_adapter
from varshare_rl.data.normalizers import ObservationNormalizer
from varshare_rl.files import write_atomically
from varshare_rl.nn.actor import Actor, CategoricalActor
from varshare_rl.nn.merge import Normalize, merged_policy
from varshare_rl.nn.plain import write_network

POSTERIOR_FILE = "varshare_posterior.safetensors"


@dataclass(frozen=True)
class TaskPolicy:
    """A task's policy, wherever it was learnt.

    Attributes:
        actor: policies of some tasks; index: which of them it is.
        normalizer: of the same tasks' observations.
        about: statements of ``export.json`` about its source.
        critics: networks of the same tasks by name, if they are wanted too.
        posterior: beside the adapter's means, by ``<network>.<layer>.<name>``; for adapters only.
    """

    actor: Actor
    index: int
    normalizer: ObservationNormalizer
    about: dict[str, Any]
    critics: dict[str, nn.Module] = field(default_factory=dict)
    posterior: dict[str, Tensor] = field(default_factory=dict)

    @property
    def discrete(self) -> bool:
        """True if actions are choices."""
        return isinstance(self.actor, CategoricalActor)

    @property
    def obs_size(self) -> int:
        """Size of an observation."""
        return self.normalizer.moments.mean.shape[1]

    def normalize(self) -> Normalize | None:
        """Return the observation statistics of the task, None if observations are taken as they are."""
        if not self.normalizer.enabled:
            return None
        moments = self.normalizer.moments
        return Normalize(moments.mean[self.index].float(), moments.std()[self.index].float(), self.normalizer.clip)

    def plain(self) -> nn.Sequential:
        """Make the network from raw observations ``[B, F]`` to deterministic actions, on the posterior mean."""
        policy, normalize = merged_policy(self.actor, self.index), self.normalize()
        return policy if normalize is None else nn.Sequential(normalize, *policy).eval()


def write_peft(folder: Path, policy: TaskPolicy, task: str) -> None:
    """Write every network's adapter folder and base, what LoRA has no room for, and instructions."""
    for name, network in {"actor": policy.actor.network, **policy.critics}.items():
        adapter, base = task_adapter(network, policy.index), base_network(network)
        (folder / f"{name}_base").mkdir()
        write_network(folder / f"{name}_base", base)
        write_adapter(folder / name, adapter, describe(adapter, base_model=f"{name}_base"))
    side, normalize = dict(policy.posterior), policy.normalize()
    if normalize is not None:
        side |= {"observation.mean": normalize.mean, "observation.std": normalize.std}
    if side:
        tensors = {key: tensor.cpu().contiguous() for key, tensor in side.items()}
        write_atomically(folder / POSTERIOR_FILE, save(tensors))
    write_atomically(folder / "README.md", _instructions(policy, normalize, task))


def _instructions(policy: TaskPolicy, normalize: Normalize | None, task: str) -> str:
    modules = "".join(f"    nn.{module},\n" for module in base_network(policy.actor.network))
    inputs = "Observations go in as they are."
    if normalize is not None:
        inputs = (
            f"Observations go in as `((obs - mean) / std).clamp(-{normalize.clip:g}, {normalize.clip:g})` with "
            f"`observation.mean` and `observation.std` of `{POSTERIOR_FILE}`."
        )
    actions = policy.actor.action_mask.shape[-1]
    outputs = (
        f"The actor's {actions} outputs are logits; the policy takes the largest of those that the task allows."
        if policy.discrete
        else f"The first {actions} of the actor's {2 * actions} outputs are means: the action is their `tanh`. "
        "The rest serve exploration."
    )
    posterior = ""
    if policy.posterior:
        prior = " and the scale of their prior" if any("prior_scale" in key for key in policy.posterior) else ""
        posterior = f"""
The adapter is the posterior mean. `{POSTERIOR_FILE}` holds what LoRA has no room for: by network and
layer, `rho` of both factors (standard deviation `softplus(rho)`){prior}.
"""
    critics = ", ".join(f"`{name}`" for name in policy.critics)
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
{also}{posterior}"""
