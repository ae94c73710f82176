"""Bases of methods: one network for all tasks, parameters of every task's own, corrections of a frozen network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter, adapter_scale, fresh_adapter
from varshare_rl.errors import UserError
from varshare_rl.nn.layer import check_positive
from varshare_rl.nn.mlp import BroNet, TaskMLP
from varshare_rl.nn.parameters import total_kl
from varshare_rl.transfer.low_rank import FrozenBase, adapter_of, adapter_state, take_adapter
from varshare_rl.transfer.method import (
    ContinualMethod,
    NetworkSpec,
    Pretrained,
    StorageCost,
    frozen_eval,
    state_bytes,
    state_copy,
)
from varshare_rl.transfer.pretrained import pretrained_policy
from varshare_rl.types import Tree


class OneNetwork(ContinualMethod):
    """One network, trained on each task in turn, that acts in all of them."""

    task_free = True
    state_fields: ClassVar[tuple[str, ...]] = ("weights",)

    def __init__(self, config: Any, spec: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, spec, pretrained)
        self.weights = state_copy(self.base_network())

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """Make the network as the last task has left it."""
        return self.spec.plain(self.weights)

    def starts_from(self, similar: int | None = None) -> int | None:
        """Return the last task."""
        return self.tasks - 1 if self.tasks else None

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the weights."""
        self.weights = state_copy(network)
        self.tasks += 1

    def policy(self, task: int) -> nn.Module:
        """Return the one network."""
        self.check_learnt(task)
        return frozen_eval(self.spec.plain(self.weights))

    def stored(self) -> StorageCost:
        """Return the bytes of one network."""
        return StorageCost(shared=state_bytes(self.weights))


class OwnParameters(ContinualMethod):
    """Parameters of its own for every task; a pretrained agent's tasks keep the policies that they have there.

    Attributes:
        own: state dicts of these parameters, of the sequence's own tasks in order.
    """

    def __init__(self, config: Any, spec: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, spec, pretrained)
        self.own: list[dict[str, Tensor]] = []

    def keep(self, own: dict[str, Tensor]) -> None:
        """Add the parameters of the task that was learnt."""
        self.own = [*self.own, own]
        self.tasks += 1

    def policy(self, task: int) -> nn.Module:
        """Return the network with the task's own parameters, or the pretrained agent's."""
        self.check_learnt(task)
        if self.pretrained is not None and task < self.old_tasks:
            return pretrained_policy(self.spec, self.pretrained, task)
        return frozen_eval(self.own_network(task - self.old_tasks))

    @abstractmethod
    def own_network(self, number: int) -> nn.Module:
        """Make the network of one of the sequence's own tasks, counted from 0."""


class LowRankMethod(ContinualMethod):
    """``W_i = theta + dW_i`` with a frozen ``theta`` and a low-rank correction ``dW_i`` for every task.

    The base is the pretrained agent's, or what the first task learns with all weights, whose correction is then
    nothing. Weights and biases of the base, norms included, stay as they are.

    Attributes:
        base: the frozen weights.
        adapters: corrections of the tasks learnt so far.
    """

    def __init__(self, config: Any, spec: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, spec, pretrained)
        check_positive(rank=config.rank, alpha=1.0 if config.alpha is None else config.alpha)
        self.base = FrozenBase(spec, pretrained)
        self.adapters: list[Adapter] = [] if pretrained is None else [*map(dict, pretrained.adapters)]

    @property
    def lr_scale(self) -> float:
        """That of the options, and 1 while the base itself is learnt."""
        return 1.0 if self.base.weights is None else float(self.config.lr_scale)

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """Make a network with all weights for the first task of all, afterwards a correction of the frozen base."""
        if self.base.weights is None:
            return self.base_network()
        if similar is not None:
            self.check_learnt(similar)
        return self.corrected(similar)

    def starts_from(self, similar: int | None = None) -> int | None:
        """Return the similar task where the run has looked for it, otherwise that of the base; None: an agent's."""
        if similar is not None or self.tasks == 0:
            return similar
        return None if self.base.given else 0

    @abstractmethod
    def corrected(self, similar: int | None) -> nn.Module:
        """Make the base with a new task's correction, which alone is trained."""

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the correction, or the base."""
        if self.base.weights is None:
            self.base.keep(network)
        self.adapters.append(take_adapter(network))
        self.tasks += 1

    def policy(self, task: int) -> nn.Module:
        """Return the base with the task's correction."""
        self.check_learnt(task)
        return frozen_eval(self.base.corrected(self.adapter(task)))

    def adapter(self, task: int) -> Adapter:
        """Return the correction that a learnt task is acted with."""
        return self.adapters[task]

    def fresh_adapter(self) -> Adapter:
        """Make a LoRA adapter that corrects nothing yet, of the method's rank and scale."""
        scale = adapter_scale(self.config.alpha, self.config.rank, self.config.rslora)
        return fresh_adapter(self.base.layers(), self.config.rank, scale)

    def state(self) -> Tree:
        """Return the base and the corrections, but for what the pretrained agent gives."""
        adapters = [adapter_state(adapter) for adapter in self.adapters[self.old_tasks :]]
        return {**super().state(), "base": self.base.state(), "adapters": adapters}

    def load_state(self, state: Tree) -> None:
        adapters = [adapter_of(adapter) for adapter in state.get("adapters", [])]
        self.adapters[self.old_tasks :] = adapters
        self.base.load_state(state["base"])
        super().load_state({"tasks": self.old_tasks + len(adapters), **state})  # old checkpoints leave it out


def weighted_kl(network: nn.Module, kl_weight: float, transitions: int) -> Tensor | float:
    """Return ``kl_weight * KL / transitions`` of a network of one task, ``[1]``."""
    if kl_weight == 0.0:
        return 0.0
    return total_kl(network, 1) * (kl_weight / max(transitions, 1))


def head_path(network: nn.Module, method: str) -> str:
    """Return the path of a network's last linear layer, ``layers.<last>``.

    Raises:
        UserError: nothing stands before it that ``method`` could keep apart, or the network has no such order.
    """
    if not isinstance(network, TaskMLP | BroNet):
        raise UserError(
            f"method={method} keeps heads apart, and a {type(network).__name__} has no last layer of its own; "
            "use blocks=mlp or blocks=bronet"
        )
    if len(network.layers) < 2:
        raise UserError(
            f"method={method} keeps heads apart from hidden layers, and this network has none; "
            "give it a hidden layer (hidden=[64], for example)"
        )
    return f"layers.{len(network.layers) - 1}"


def split_head(state: Mapping[str, Tensor], path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a network's state dict into that of its body and that of the head at ``path``, under the same names."""
    prefix = f"{path}."
    body = {name: value for name, value in state.items() if not name.startswith(prefix)}
    return body, {name: value for name, value in state.items() if name.startswith(prefix)}
