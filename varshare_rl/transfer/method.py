"""What every continual-learning method is: how one network goes from task to task.

A method governs one network (the policy's; a critic's as well, where the run says so) and sees nothing of
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
from varshare_rl.types import Tree

#: Makes a linear layer of a network from its input and output size.
LayerFactory = Callable[[int, int], nn.Module]

BYTES_PER_NUMBER = 4  # of float32


class Likelihood(Protocol):
    """What the outputs of a network mean: the parameters of a distribution, ``[1, N, G]``."""

    def sampled_log_prob(self, outputs: Tensor) -> Tensor:
        """Log-density of draws from the distributions themselves, ``[1, N]``; differentiable, the draws are not."""

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """``KL(old || new)`` of every row in nats, ``[1, N]``."""


@dataclass(frozen=True)
class NetworkSpec:
    """The networks that a method makes.

    Attributes:
        in_features, out_features: sizes of input and output.
        stack: puts the layers that a maker makes together with activations and norms, as the run's options say.
        likelihood: what the outputs mean.
    """

    in_features: int
    out_features: int
    stack: Callable[[LayerFactory], nn.Module]
    likelihood: Likelihood

    def plain(self) -> nn.Module:
        """A fresh network of plain linear layers."""
        return self.stack(SharedLayer)


@dataclass(frozen=True)
class Pretrained:
    """An agent of earlier tasks that the sequence goes on from.

    Attributes:
        base: the state dict of the weights that its tasks share, for a network of :meth:`NetworkSpec.plain`.
        adapters: of every earlier task in order, by the paths of the linear layers (``layers.0``, ...); their
            spread is in ``spreads``. Empty adapters for an agent without corrections.
        spreads: standard deviations of the factors by path, ``(a [r, in], b [out, r])``; empty without posteriors.
    """

    base: Mapping[str, Tensor]
    adapters: tuple[Adapter, ...] = ()
    sigmas: tuple[Mapping[str, tuple[Tensor, Tensor]], ...] = ()


@dataclass(frozen=True)
class StorageCost:
    """Bytes that must be kept after a task.

    Attributes:
        shared: what all tasks use together.
        tasks: what belongs to one task each, all of them added up; spreads included.
        memory: what is kept for learning further tasks only: samples, importances, originals.
    """

    shared: int
    tasks: int
    memory: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.shared + self.tasks + self.memory


@dataclass
class ContinualMethodConfig(ABC):
    """Options that every method has, and what it says of itself before it is built."""

    #: Whether every task trains the same parameters, so that an optimiser's moments can go on.
    keeps_parameters: ClassVar[bool] = False
    #: Whether a policy is a base that all tasks share with a low-rank correction of it.
    low_rank: ClassVar[bool] = False

    name: str = "???"

    @abstractmethod
    def build(self, shape: NetworkSpec, pretrained: Pretrained | None = None) -> ContinualMethod:
        """The method for networks of a shape, after a pretrained agent if there is one."""


class ContinualMethod(ABC):
    """How one network learns one task after another.

    For task ``i`` the run calls :meth:`begin`, trains the network that it returns, and calls :meth:`end` with it.
    Only parameters that require a gradient are trained. In between and afterwards :meth:`policy` gives the network
    with which a task is acted. When a run is resumed within task ``i``, the state from before the task is put back,
    :meth:`begin` is called again, and the network's own ``state_dict`` is loaded; so whatever changes while a task
    is learnt must be in there, and :meth:`begin` must build the same modules each time.

    Args:
        config: of the method.
        shape: the networks that it makes.
        pretrained: an agent of earlier tasks; the sequence's first task then has the number ``len(pretrained.adapters)``.
    """

    #: Whether :meth:`policy` is the same network for all tasks, so that a policy needs no task id.
    task_free: ClassVar[bool] = False

    def __init__(self, config: Any, shape: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        self.config, self.shape, self.pretrained = config, shape, pretrained
        self.old_tasks = 0 if pretrained is None else len(pretrained.adapters)
        self.tasks = self.old_tasks  # learnt so far

    @abstractmethod
    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """The network to be trained on task number ``task``, the next one.

        ``similar`` is the earlier task whose policy did best on it, where the run has looked for it.
        """

    def penalty(self, network: nn.Module, transitions: int) -> Tensor | float:
        """What is added to the loss of the task being learnt, ``[1]``; it is trained on so many transitions."""
        return 0.0

    def trained_parameters(self, network: nn.Module) -> int:
        """Numbers of a network from :meth:`begin` that are trained."""
        return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)

    def advance(self, network: nn.Module, fraction: float) -> None:  # noqa: B027 (most methods have nothing to do)
        """Take note that so much of the task's transitions is done."""

    @abstractmethod
    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Take what the task that was learnt leaves behind, and count it in :attr:`tasks`.

        ``inputs [1, N, F]`` are inputs that the network meets when it acts after learning, in the order met.
        """

    @abstractmethod
    def policy(self, task: int) -> nn.Module:
        """The network for a learnt task, not to be trained, as further tasks have left it."""

    def sigma(self, task: int) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Standard deviations of the factors of a learnt task's correction, as in :class:`Pretrained`."""
        return {}

    @abstractmethod
    def stored(self) -> StorageCost:
        """What has to be kept by now."""

    @property
    def report(self) -> list[dict[str, Any]]:
        """What the method has to say of what it keeps, as rows of plain values; nothing unless it loses any."""
        return []

    @abstractmethod
    def state(self) -> Tree:
        """Everything that :meth:`end` has changed."""

    @abstractmethod
    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""

    def base_network(self) -> nn.Module:
        """A plain network: that of the pretrained agent, or a fresh one."""
        network = self.shape.plain()
        if self.pretrained is not None:
            network.load_state_dict(dict(self.pretrained.base))
        return network

    def check_learnt(self, task: int) -> None:
        """Raise IndexError unless the task is one of those that were learnt."""
        if not 0 <= task < self.tasks:
            raise IndexError(f"unknown task id {task}: {self.tasks} tasks were learnt (0 to {self.tasks - 1})")


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def state_copy(network: nn.Module) -> dict[str, Tensor]:
    """A detached copy of a network's state dict."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def frozen_eval(network: nn.Module) -> nn.Module:
    """The network in eval mode and without gradients."""
    return network.requires_grad_(False).eval()
