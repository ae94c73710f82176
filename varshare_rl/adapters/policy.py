"""One task's policy, from a training run or a sequence: what it does, and as a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varshare_rl.data.normalizers import ObservationNormalizer
from varshare_rl.envs.spaces import TaskSpaces, to_native_action, to_policy_observation
from varshare_rl.errors import UserError
from varshare_rl.nn.actor import Actor, Categorical, GaussianActor, GaussianFamily, PolicyDistribution
from varshare_rl.nn.merge import OneTask
from varshare_rl.nn.stochastic import posterior_mean

#: Observations that files are compared with the agent on, and the bound on their difference.
CHECKED, TOLERANCE = 1000, 1e-5


@dataclass(frozen=True)
class TaskCritic:
    """One network of a task's critic.

    Attributes:
        network: the critic's own, of all tasks.
        units: what comes after it, to values in units of the task's return.
        value: the agent's own values ``[N]`` of inputs ``[N, F]``, in the same units.
    """

    network: nn.Module
    units: Sequence[nn.Module]
    value: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TaskPolicy:
    """A task's policy, wherever it was learnt.

    Attributes:
        actor: policies of some tasks; index: which of them it is.
        spaces: the task's own observation and actions.
        normalizer: of the same tasks' observations.
        about: statements of ``export.json`` about its source.
        critics: of the same task by name, if they are wanted too.
        posterior: beside the adapter's means, by ``<network>.<layer>.<name>``; for adapters only.
    """

    actor: Actor
    index: int
    spaces: TaskSpaces
    normalizer: ObservationNormalizer
    about: dict[str, Any] = field(default_factory=dict)
    critics: dict[str, TaskCritic] = field(default_factory=dict)
    posterior: dict[str, Tensor] = field(default_factory=dict)

    def act(self, obs: Any, deterministic: bool = True) -> Any:
        """Return the task's own actions for its own observations, one ``[F]`` or a batch ``[N, F]``.

        Raises:
            UserError: observations of another shape.
        """
        padded = to_policy_observation(obs, self.spaces)
        if padded.ndim > 2:
            raise UserError(f"observations have shape {padded.shape}; give one [F], or a batch [N, F]")
        with torch.no_grad():
            distribution = self.distribution(np.atleast_2d(padded))
            action = distribution.mode() if deterministic else distribution.sample().action
        found = action[0].cpu().numpy()
        return to_native_action(found[0] if padded.ndim == 1 else found, self.spaces)

    def distribution(self, padded: npt.NDArray[np.float32]) -> PolicyDistribution:
        """Return the policy on the posterior mean ``[1, N, ...]`` for padded observations ``[N, F]``."""
        device = self.actor.action_mask.device
        tasks = len(self.normalizer.moments.count)
        rows = torch.from_numpy(padded).to(device).expand(tasks, -1, -1)
        mask = self.actor.action_mask[self.index : self.index + 1, 0].bool()
        actor = self.actor.with_network(self.actor.network, mask).to(device)
        with posterior_mean(actor):
            found: PolicyDistribution = actor(self.normalizer(rows)[self.index :][:1], torch.tensor([self.index]))
        return found

    def module(self) -> nn.Sequential:
        """Make the module from the task's observations ``[B, F]`` to its deterministic actions."""
        network = OneTask(self.actor.network, self.index)
        return nn.Sequential(self.input(), network, self.output()).eval()

    def input(self) -> PolicyInput:
        """Make the module from the task's observations to what its network takes."""
        return PolicyInput(self.normalizer, self.index, self.spaces.obs_size)

    def output(self) -> NativeAction:
        """Make the module from what its network gives to the task's own actions."""
        return NativeAction(self.spaces, self.family)

    @property
    def family(self) -> GaussianFamily:
        """The form of its Gaussian; of no meaning for choices."""
        return self.actor.config.policy if isinstance(self.actor, GaussianActor) else GaussianFamily.tanh_gaussian

    def on_cpu(self) -> TaskPolicy:
        """Return a copy on the CPU, where files are made and checked."""
        actor, normalizer = deepcopy(self.actor).cpu(), deepcopy(self.normalizer).cpu()
        return replace(self, actor=actor, normalizer=normalizer)

    def check(self, run: Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]) -> float:
        """Compare what a file computes with the agent, on observations such as it has met.

        Returns:
            the largest difference of an action, in units of 1 or of the largest bound. What is rounded or chosen
            differs by as much as it is worse than the agent's own: ties do not count.

        Raises:
            UserError: they differ by more than 1e-5.
        """
        generator, moments, spaces = torch.Generator().manual_seed(0), self.normalizer.moments, self.spaces
        rows = torch.randn(CHECKED, spaces.obs_size, generator=generator)
        if self.normalizer.enabled:
            mean, std = (x[self.index, : spaces.obs_size].float() for x in (moments.mean, self.normalizer.std()))
            rows = mean + 2.0 * std * rows
        obs, found = rows.numpy(), run(rows.numpy())
        with exact_products():
            return self._compare(obs, found)

    @torch.no_grad()
    def _compare(self, obs: npt.NDArray[np.float32], found: npt.NDArray[Any]) -> float:
        spaces, wanted = self.spaces, self.act(obs)
        distribution = self.distribution(to_policy_observation(obs, spaces))
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            kinds = [f"{x.dtype} {list(x.shape)}" for x in (found, wanted)]
            raise UserError(f"the file's actions are {kinds[0]}, and the agent's {kinds[1]}")
        if isinstance(distribution, Categorical):
            chosen = distribution.log_probs[0].gather(1, torch.from_numpy(found - spaces.start).unsqueeze(1))
            worst = float((distribution.log_probs[0].max(1, keepdim=True).values - chosen).max())
        else:
            exact = to_native_action(distribution.mode()[0].numpy(), replace(spaces, dtype="float64"))
            rounded = 0.5 if spaces.action_dtype.kind in "iu" else 0.0
            scale = max(1.0, *(abs(bound) for bound in (*spaces.low, *spaces.high)))
            worst = float(np.maximum(np.abs(found.astype(np.float64) - exact) - rounded, 0.0).max()) / scale
        if not worst <= TOLERANCE:
            raise UserError(f"the file's actions differ from the agent's by {worst:g}, more than {TOLERANCE:g}")
        return worst


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, a CPU computes large matrix products in float32, whatever training was told to."""
    backend: Any = torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


class PolicyInput(nn.Module):
    """A task's own observations as its network takes them: normalised, what is no number 0, padded with zeros.

    Args:
        normalizer: of several tasks, that has stopped learning.
        task: which of them; obs_size: size of its own observations.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, normalizer: ObservationNormalizer, task: int, obs_size: int) -> None:
        super().__init__()
        self.enabled, self.clip = normalizer.enabled, normalizer.clip
        for name, values in (("mean", normalizer.moments.mean), ("std", normalizer.std())):
            self.register_buffer(name, values[task, :obs_size].float().clone())
        self.padding = normalizer.moments.mean.shape[1] - obs_size

    def forward(self, obs: Tensor) -> Tensor:
        """``[B, n]`` to ``[B, F]``."""
        if self.enabled:
            x = torch.nan_to_num((obs - self.mean) / self.std, 0.0).clamp(-self.clip, self.clip)
        else:
            x = torch.nan_to_num(obs, 0.0, 0.0, 0.0)
        return F.pad(x, (0, self.padding)) if self.padding else x


class NativeAction(nn.Module):
    """An actor's outputs as a task's own deterministic actions: within its bounds and of its type, or a choice.

    Args:
        spaces: of the task; family: form of a policy of Box actions.
    """

    low: Tensor
    high: Tensor

    def __init__(self, spaces: TaskSpaces, family: GaussianFamily) -> None:
        super().__init__()
        self.bound = family.bound
        self.size, self.discrete, self.start = spaces.action_size, spaces.discrete, spaces.start
        if not spaces.discrete:
            self.kind = torch.from_numpy(np.zeros(0, spaces.action_dtype)).dtype
            exact = torch.float32 if self.kind is torch.float32 else torch.float64
            for name, bound in (("low", spaces.low), ("high", spaces.high)):
                self.register_buffer(name, torch.tensor(bound, dtype=exact))

    def forward(self, outputs: Tensor) -> Tensor:
        """``[B, G]`` to ``[B, A]``, or to ``[B]`` int64."""
        own = outputs[:, : self.size]
        if self.discrete:
            return own.argmax(-1) + self.start
        half = (self.high - self.low) / 2
        action = self.low + half + half * self.bound(own).to(self.low.dtype)
        if not self.kind.is_floating_point:
            action = action.round()
        return torch.clamp(action, self.low, self.high).to(self.kind)
