"""The methods that govern an agent's networks, one for each network, and how algorithms come by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from varshare_rl.transfer.method import ContinualMethod, NetworkSpec, Pretrained, StorageCost
from varshare_rl.transfer.methods.finetune import Finetune, FinetuneConfig
from varshare_rl.types import Tree

#: Makes a method for a network from its shape and what its counterpart in an earlier agent leaves.
MethodFactory = Callable[[NetworkSpec, Pretrained | None], ContinualMethod]


class CriticCarry(Enum):
    """What becomes of the critic from task to task. Acting needs none, so nothing has to be kept of it."""

    finetune = "finetune"  # it goes on learning
    fresh = "fresh"  # a new one for every task
    method = "method"  # the same method as for the policy, which makes it one more thing that is stored


class AgentNetworks:
    """The networks of an agent that learns one task after another, by part (``actor``, ``critic``).

    Args:
        shapes: of the networks of each part, in the order in which algorithms ask for them.
        make: makes the method of a network.
        critic: what becomes of critics.
        origins: of the same networks, where the sequence goes on from an agent.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[NetworkSpec]],
        make: MethodFactory,
        critic: CriticCarry,
        all_pretrained: Mapping[str, Sequence[Pretrained]],
    ) -> None:
        self.shapes, self.critic = shapes, critic
        self.methods: dict[str, list[ContinualMethod]] = {}
        for part, of_part in shapes.items():
            of_pretrained: list[Pretrained | None] = (
                [*all_pretrained[part]] if part in all_pretrained else [None] * len(of_part)
            )
            governed = part == "actor" or critic is CriticCarry.method
            if governed:
                self.methods[part] = [make(*pair) for pair in zip(of_part, of_pretrained, strict=True)]
            elif critic is CriticCarry.finetune:
                self.methods[part] = [
                    Finetune(FinetuneConfig(), *pair) for pair in zip(of_part, of_pretrained, strict=True)
                ]
        self.networks: dict[str, list[nn.Module]] = {part: [] for part in shapes}
        self._given: dict[str, int] = {}

    @property
    def method(self) -> ContinualMethod:
        """The method of the policy's network."""
        return self.methods["actor"][0]

    def begin(self, task: int, similar: int | None) -> None:
        """Make the networks for a task, to be asked for with :meth:`network`."""
        self.networks = {
            part: (
                [method.begin(task, similar) for method in self.methods[part]]
                if part in self.methods
                else [shape.plain() for shape in shapes]
            )
            for part, shapes in self.shapes.items()
        }
        self._given = dict.fromkeys(self.shapes, 0)

    def network(self, part: str, in_features: int, out_features: int) -> nn.Module:
        """The next network of a part; algorithms ask for each of them once."""
        position = self._given[part]
        shape = self.shapes[part][position]
        assert (in_features, out_features) == (shape.in_features, shape.out_features)
        self._given[part] = position + 1
        return self.networks[part][position]

    def trainable(self) -> bool:
        """Whether the policy has anything to learn in this task."""
        return any(parameter.requires_grad for parameter in self.networks["actor"][0].parameters())

    def penalty(self, part: str, transitions_per_task: int) -> Tensor | float:
        """What the methods add to the losses of a part, ``[1]``."""
        pairs = zip(self.methods.get(part, []), self.networks[part], strict=False)
        total: Tensor | float = 0.0
        for method, network in pairs:
            total = total + method.penalty(network, transitions_per_task)
        return total

    def advance(self, fraction: float) -> None:
        """Take note of how much of the task is done."""
        for part, methods in self.methods.items():
            for method, network in zip(methods, self.networks[part], strict=True):
                method.advance(network, fraction)

    def end(self, obs: Tensor, action: Tensor) -> None:
        """Let the methods take what the task leaves behind.

        ``obs [1, N, F]`` are normalised observations that the trained policy met and ``action [1, N, A]`` what it
        did: critics of actions take both as inputs.
        """
        both = torch.cat([obs, action.to(obs.dtype)], dim=-1) if action.dim() == obs.dim() else obs
        for part, methods in self.methods.items():
            for method, network in zip(methods, self.networks[part], strict=True):
                size = method.shape.in_features
                method.end(network, obs if size == obs.shape[-1] else both)

    def skip(self) -> None:
        """Count a task in which nothing was trained."""
        for part, methods in self.methods.items():
            for method, network in zip(methods, self.networks[part], strict=True):
                method.end(network, torch.zeros(1, 0, method.shape.in_features))

    def policy(self, task: int) -> nn.Module:
        """The policy's network for a task that has been learnt."""
        return self.method.policy(task)

    def stored(self) -> StorageCost:
        """What has to be kept by now: of the policy, and of critics where the method governs them."""
        parts = [
            method.stored()
            for part, methods in self.methods.items()
            if part == "actor" or self.critic is CriticCarry.method
            for method in methods
        ]
        return StorageCost(
            sum(part.shared for part in parts),
            sum(part.tasks for part in parts),
            sum(part.memory for part in parts),
        )

    def trained_parameters(self) -> int:
        """Numbers of the policy's network that are trained in this task."""
        return self.method.trained_parameters(self.networks["actor"][0])

    def state(self) -> Tree:
        """State of all methods."""
        return {part: [method.state() for method in methods] for part, methods in self.methods.items()}

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        for part, methods in self.methods.items():
            for method, own in zip(methods, state[part], strict=True):
                method.load_state(own)
