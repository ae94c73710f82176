"""Progressive networks: a column per task that looks sideways at those before it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from varshare_rl.fields import bounded
from varshare_rl.nn.progressive import Columns
from varshare_rl.registry import register
from varshare_rl.transfer.method import (
    ContinualMethod,
    ContinualMethodConfig,
    NetworkSpec,
    Pretrained,
    StorageCost,
    frozen_eval,
    state_copy,
    tensor_bytes,
)
from varshare_rl.transfer.pretrained import pretrained_policy, pretrained_storage
from varshare_rl.types import Tree


@register("method", "pnn")
@dataclass
class PNNConfig(ContinualMethodConfig):
    """``method=pnn``."""

    name: str = "pnn"
    lateral: int = bounded(16, least=1)
    "Width of the adapters between columns."

    def build(self, shape: NetworkSpec, pretrained: Pretrained | None = None) -> PNN:
        """The method."""
        return PNN(self, shape, pretrained)


class PNN(ContinualMethod):
    """A fresh column per task with adapters from the frozen ones before it (Rusu et al. 2016).

    See :class:`varshare_rl.nn.progressive.LateralLayer`. What differs from the paper: the adapter's hidden layer has
    ``lateral`` units instead of as many as the column's, adapters have no biases, and their activation is ReLU
    whatever the column's is. Every layer has an adapter, the last one too, and no column's size is reduced.

    Columns grow with the number of tasks and their adapters with its square. With a pretrained agent its base is the first
    column; its tasks' corrections are not looked at.
    """

    def __init__(self, config: PNNConfig, shape: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, shape, pretrained)
        self.columns: list[dict[str, Tensor]] = []  # of the sequence's own tasks

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """All columns, frozen, and a fresh one."""
        network = self._network(len(self.columns), fresh=1)
        network.requires_grad_(False)
        network.columns[-1].requires_grad_(True)
        return network

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the last column."""
        assert isinstance(network, Columns)
        self.columns = [*self.columns, state_copy(network.columns[-1])]
        self.tasks += 1

    def policy(self, task: int) -> nn.Module:
        """The task's column and those that it looks at."""
        self.check_learnt(task)
        if self.pretrained is not None and task < self.old_tasks:
            return pretrained_policy(self.shape, self.pretrained, task)
        return frozen_eval(self._network(task - self.old_tasks + 1))

    def stored(self) -> StorageCost:
        """A column per task; a pretrained agent's base is shared."""
        base = 0 if self.pretrained is None else tensor_bytes(*self.pretrained.base.values())
        columns = sum(tensor_bytes(*column.values()) for column in self.columns)
        return StorageCost(base, pretrained_storage(self.pretrained).tasks + columns)

    def state(self) -> Tree:
        """The columns."""
        return {"tasks": self.tasks, "columns": self.columns}

    def load_state(self, state: Tree) -> None:
        """Put back what :meth:`state` gave."""
        self.tasks, self.columns = state["tasks"], state["columns"]

    def _network(self, learnt: int, fresh: int = 0) -> Columns:
        """The base and the first ``learnt`` columns with their weights, and ``fresh`` ones."""
        base = [] if self.pretrained is None else [dict(self.pretrained.base)]
        kept = base + self.columns[:learnt]
        network = Columns(self.shape.stack, len(kept) + fresh, self.config.lateral)
        for column, weights in zip(network.columns, kept, strict=False):
            column.load_state_dict(weights)
        return network
