"""Progressive networks: a column per task that looks sideways at those before it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from varshare_rl.fields import bounded
from varshare_rl.nn.progressive import Columns
from varshare_rl.registry import register
from varshare_rl.transfer.bases import OwnParameters
from varshare_rl.transfer.method import (
    ContinualMethodConfig,
    NetworkSpec,
    Pretrained,
    StorageCost,
    state_bytes,
    state_copy,
)
from varshare_rl.transfer.pretrained import pretrained_storage


@register("method", "pnn")
@dataclass
class PNNConfig(ContinualMethodConfig):
    """``method=pnn``."""

    name: str = "pnn"
    lateral: int = bounded(16, least=1)
    "Width of the adapters between columns."

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> PNN:
        """Make the method."""
        return PNN(self, spec, pretrained)


class PNN(OwnParameters):
    """A fresh column per task with adapters from the frozen ones before it (Rusu et al. 2016).

    See :class:`varshare_rl.nn.progressive.LateralLayer`. Differences from the paper: the adapter's hidden layer has
    ``lateral`` units instead of as many as the column's, adapters have no biases, and their activation is ReLU
    whatever the column's is. Every layer has an adapter, the last one too, and no column's size is reduced.

    Columns grow with the number of tasks and their adapters with its square. With a pretrained agent its base is
    the first column; its tasks' corrections are not looked at.
    """

    state_fields = ("columns=own",)

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """Make all columns, frozen, and a fresh one."""
        network = self._columns(len(self.own), fresh=1)
        network.requires_grad_(False)
        network.columns[-1].requires_grad_(True)
        return network

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the last column."""
        assert isinstance(network, Columns)
        self.keep(state_copy(network.columns[-1]))

    def own_network(self, number: int) -> nn.Module:
        """Make the task's column and those that it looks at."""
        return self._columns(number + 1)

    def stored(self) -> StorageCost:
        """Return the bytes of a column per task; a pretrained agent's base is shared."""
        base = 0 if self.pretrained is None else state_bytes(self.pretrained.base)
        return StorageCost(base, pretrained_storage(self.pretrained).tasks + state_bytes(*self.own))

    def _columns(self, learnt: int, fresh: int = 0) -> Columns:
        """Make the base and the first ``learnt`` columns with their weights, and ``fresh`` ones."""
        base = [] if self.pretrained is None else [dict(self.pretrained.base)]
        kept = base + self.own[:learnt]
        network = Columns(self.spec.stack, len(kept) + fresh, self.config.lateral)
        for column, weights in zip(network.columns, kept, strict=False):
            column.load_state_dict(weights)
        return network
