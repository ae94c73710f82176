"""Continual-learning methods: how one network goes from task to task.

A method has one network (the policy's; a critic's as well, where the run says so) and sees nothing of
algorithms, environments or runs. Networks are built for one task, ``T = 1``: called as
``network(x [1, B, F], task_ids [1])`` with the id 0, whatever the task's place in the sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.state import Stateful

#: Makes a linear layer of a network from its input and output size.
LayerFactory = Callable[[int, int], nn.Module]
#: Makes a network of a factory's layers, with activations and norms as the run's options say.
Stack = Callable[[LayerFactory], nn.Module]


class Likelihood(Protocol):
    """Meaning of a network's outputs: the parameters of a distribution, ``[1, N, G]``."""

    def complete(self, outputs: Tensor) -> Tensor:
        """Return the outputs with what else the distributions have now, ``[1, N, P]``: what is kept of a task.

        Complete ones stay as they are.
        """

    def sampled_log_prob(self, outputs: Tensor) -> Tensor:
        """Return the log-density of (detached) draws from the distributions themselves, ``[1, N]``."""

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Return ``KL(old || new)`` of every row in nats, ``[1, N]``; ``old`` are outputs, complete or not."""


@dataclass(frozen=True)
class NetworkSpec:
    """Networks that a method makes.

    Attributes:
        in_features, out_features: sizes of input and output.
        stack: makes a network of some kind of layers.
        likelihood: meaning of the outputs.
    """

    in_features: int
    out_features: int
    stack: Stack
    likelihood: Likelihood

    def plain(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Make a network of plain linear layers, fresh or with the weights of a state dict."""
        network = self.stack(SharedLayer)
        if weights is not None:
            network.load_state_dict(dict(weights))
        return network


@dataclass(frozen=True)
class Pretrained:
    """A network of the trained agent that the sequence goes on from.

    Attributes:
        base: state dict of the weights that its tasks share, for a network of :meth:`NetworkSpec.plain`.
        adapters: one per earlier task in order, by the paths of the linear layers (``layers.0``, ...). Empty
            adapters for an agent without corrections.
        sigmas: standard deviations of the factors by path, ``(a [r, in], b [out, r])``; empty without posteriors.
    """

    base: Mapping[str, Tensor]
    adapters: tuple[Adapter, ...] = ()
    sigmas: tuple[Mapping[str, tuple[Tensor, Tensor]], ...] = ()


@dataclass(frozen=True)
class StorageCost:
    """Bytes that must be kept after a task; costs can be added.

    Attributes:
        shared: used by all tasks together.
        tasks: of one task each, summed over tasks; standard deviations included.
        memory: for learning further tasks only: samples, importances, originals.
    """

    shared: int = 0
    tasks: int = 0
    memory: int = 0

    def __add__(self, other: StorageCost) -> StorageCost:
        return StorageCost(self.shared + other.shared, self.tasks + other.tasks, self.memory + other.memory)

    @property
    def total(self) -> int:
        """All bytes."""
        return self.shared + self.tasks + self.memory


@dataclass
class ContinualMethodConfig(ABC):
    """Options that every method has, and what is known of it before it is built."""

    #: True if every task trains the same parameters, so that an optimiser's moments can go on.
    keeps_parameters: ClassVar[bool] = False
    #: True if a policy is a base that all tasks share with a low-rank correction of it.
    low_rank: ClassVar[bool] = False

    name: str = "???"

    @abstractmethod
    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> ContinualMethod:
        """Make the method for networks of a kind, after a pretrained agent if there is one."""


class ContinualMethod(Stateful, ABC):
    """Way in which one network learns one task after another.

    For task ``i`` the run calls :meth:`begin`, trains the network that it returns, and calls :meth:`end` with it.
    Only parameters that require a gradient are trained. In between and afterwards :meth:`policy` gives the network
    with which a task is acted. When a run is resumed within task ``i``, the state from before the task is put back,
    :meth:`begin` is called again, and the network's own ``state_dict`` is loaded; so whatever changes while a task
    is learnt must be in there, and :meth:`begin` must build the same modules each time. The state is everything
    that :meth:`end` changes.

    Args:
        config: of the method.
        spec: of the networks that it makes.
        pretrained: network of earlier tasks; the sequence's first task then has the number
            ``len(pretrained.adapters)``.

    Attributes:
        tasks: number of tasks learnt so far; old_tasks: those of ``pretrained`` among them.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("tasks",)

    #: True if :meth:`policy` is the same network for all tasks, so that a policy needs no task id.
    task_free: ClassVar[bool] = False

    def __init__(self, config: Any, spec: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        self.config, self.spec, self.pretrained = config, spec, pretrained
        self.old_tasks = self.tasks = 0 if pretrained is None else len(pretrained.adapters)

    @property
    def lr_scale(self) -> float:
        """Factor on the policy's learning rate in the next task."""
        return 1.0

    @abstractmethod
    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """Make the network to be trained on task number ``task``, the next one.

        ``similar`` is the earlier task whose policy did best on it, where the run has looked for it.
        """

    def starts_from(self, similar: int | None = None) -> int | None:
        """Return the learnt task whose outputs those of the next task's network begin as; None: of none.

        Or nearly, as with a mean of corrections. What a critic's outputs are in units of goes with them.
        """
        return None

    def penalty(self, network: nn.Module, transitions: int) -> Tensor | float:
        """Return the addition to the loss of a task being learnt on so many transitions, ``[1]``."""
        return 0.0

    def trained_parameters(self, network: nn.Module) -> int:
        """Count the numbers of a network from :meth:`begin` that are trained."""
        return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)

    def advance(self, network: nn.Module, fraction: float) -> None:
        """Take note that so much of the task's transitions is done."""

    @abstractmethod
    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the result of the task that was learnt, and count it in :attr:`tasks`.

        ``inputs [1, N, F]`` are inputs that the network meets when it acts after learning, in the order met.
        """

    @abstractmethod
    def policy(self, task: int) -> nn.Module:
        """Return the network for a learnt task, not to be trained, as further tasks have left it."""

    def sigma(self, task: int) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return standard deviations of the factors of a learnt task's correction, as in :class:`Pretrained`."""
        return {}

    @abstractmethod
    def stored(self) -> StorageCost:
        """Return the bytes that have to be kept by now."""

    @property
    def report(self) -> list[dict[str, Any]]:
        """Rows of plain values about losses in the kept corrections; empty for methods that lose nothing."""
        return []

    def base_network(self) -> nn.Module:
        """Make a plain network: that of the pretrained agent, or a fresh one."""
        return self.spec.plain(None if self.pretrained is None else self.pretrained.base)

    def check_learnt(self, task: int) -> None:
        """Raise IndexError unless the task is one of those that were learnt."""
        if not 0 <= task < self.tasks:
            raise IndexError(f"unknown task id {task}: {self.tasks} tasks were learnt (0 to {self.tasks - 1})")


def tensor_bytes(*tensors: Tensor) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def state_bytes(*states: Mapping[str, Tensor]) -> int:
    """Return the bytes of the tensors of some state dicts."""
    return sum(tensor_bytes(*state.values()) for state in states)


def state_copy(network: nn.Module) -> dict[str, Tensor]:
    """Return a detached copy of a network's state dict."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def frozen_eval(network: nn.Module) -> nn.Module:
    """Return the network in eval mode and without gradients."""
    return network.requires_grad_(False).eval()
