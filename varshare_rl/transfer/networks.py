"""Networks of an agent that learns one task after another, each with a method of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from varshare_rl.errors import UserError
from varshare_rl.transfer.method import ContinualMethod, NetworkSpec, Pretrained, StorageCost, frozen_eval
from varshare_rl.transfer.methods.finetune import Finetune, FinetuneConfig
from varshare_rl.types import Tree

#: Makes a method for a network from its spec and its counterpart in the agent that the sequence goes on from.
MethodFactory = Callable[[NetworkSpec, Pretrained | None], ContinualMethod]


class CriticCarry(Enum):
    """Fate of the critic from task to task. Acting needs none, so nothing has to be kept of it."""

    finetune = "finetune"  # it goes on learning
    fresh = "fresh"  # a new one for every task
    method = "method"  # the same method as for the policy, which makes it one more thing that is stored


class AgentNetworks:
    """The networks of an agent that learns one task after another, by part (``actor``, ``critic``).

    Args:
        specs: of the networks of each part, in the order in which algorithms ask for them.
        make: makes the method of a network.
        critic: fate of the critics.
        pretrained: the same networks of the agent that the sequence goes on from, for parts that go on.

    Raises:
        UserError: the method cannot be for one of the networks.
    """

    def __init__(
        self,
        specs: Mapping[str, Sequence[NetworkSpec]],
        make: MethodFactory,
        critic: CriticCarry,
        pretrained: Mapping[str, Sequence[Pretrained]],
    ) -> None:
        self.specs, self.critic = specs, critic
        self.methods: dict[str, list[ContinualMethod]] = {}
        for part, of_part in specs.items():
            if part != "actor" and critic is CriticCarry.fresh:
                continue
            factory = make if part == "actor" or critic is CriticCarry.method else _finetune
            earlier: Sequence[Pretrained | None] = pretrained.get(part) or [None] * len(of_part)
            try:
                self.methods[part] = [factory(*pair) for pair in zip(of_part, earlier, strict=True)]
            except UserError as error:
                if part == "actor":
                    raise
                raise UserError(f"carry.critic={critic.value}, and for the {part}: {error}") from None
        self.networks: dict[str, list[nn.Module]] = {part: [] for part in specs}
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
                else [spec.plain() for spec in specs]
            )
            for part, specs in self.specs.items()
        }
        self._given = dict.fromkeys(self.specs, 0)

    def network(self, part: str, in_features: int, out_features: int) -> nn.Module:
        """Return the next network of a part; algorithms ask for each of them once."""
        position = self._given[part]
        spec = self.specs[part][position]
        assert (in_features, out_features) == (spec.in_features, spec.out_features)
        self._given[part] = position + 1
        return self.networks[part][position]

    def penalty(self, part: str, transitions_per_task: int) -> Tensor | float:
        """Return the methods' addition to the losses of a part, ``[1]``."""
        total: Tensor | float = 0.0
        for method, network in self._learning(part):
            total = total + method.penalty(network, transitions_per_task)
        return total

    def advance(self, fraction: float) -> None:
        """Take note of how much of the task is done."""
        for method, network in self._learning(*self.methods):
            method.advance(network, fraction)

    def end(self, obs: Tensor, action: Tensor) -> None:
        """Let the methods keep the results of the task.

        ``obs [1, N, F]`` are normalised observations that the trained policy met and ``action [1, N, A]`` its
        actions there: critics of actions take both as inputs.
        """
        both = torch.cat([obs, action.to(obs.dtype)], dim=-1) if action.dim() == obs.dim() else obs
        for method, network in self._learning(*self.methods):
            method.end(network, obs if method.spec.in_features == obs.shape[-1] else both)

    def skip(self) -> None:
        """Count a task in which nothing was trained."""
        for method, network in self._learning(*self.methods):
            method.end(network, torch.zeros(1, 0, method.spec.in_features))

    def policy(self, task: int, meanwhile: bool = False) -> nn.Module:
        """Return the policy's network for a task that has been learnt.

        ``meanwhile``: while another one is; where all tasks have one network, it is the one that learns.
        """
        if meanwhile and self.method.task_free:
            return frozen_eval(self.method.spec.plain(self.networks["actor"][0].state_dict()))
        return self.method.policy(task)

    def stored(self) -> StorageCost:
        """Return the bytes to be kept by now: of the policy, and of critics where they have the same method."""
        parts = self.methods if self.critic is CriticCarry.method else ("actor",)
        return sum((method.stored() for part in parts for method in self.methods[part]), StorageCost())

    def trained_parameters(self) -> int:
        """Count the numbers of the policy's network that are trained in this task."""
        return self.method.trained_parameters(self.networks["actor"][0])

    def state(self) -> Tree:
        """Return the state of all methods."""
        return {part: [method.state() for method in methods] for part, methods in self.methods.items()}

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        for part, methods in self.methods.items():
            for method, own in zip(methods, state[part], strict=True):
                method.load_state(own)

    def _learning(self, *parts: str) -> Iterator[tuple[ContinualMethod, nn.Module]]:
        """Yield the methods of some parts with the networks that they train now."""
        for part in parts:
            yield from zip(self.methods.get(part, []), self.networks[part], strict=part in self.methods)


def _finetune(spec: NetworkSpec, pretrained: Pretrained | None) -> ContinualMethod:
    return Finetune(FinetuneConfig(), spec, pretrained)
