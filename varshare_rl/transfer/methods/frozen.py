"""Frozen: one network that learns the first task and is used for all the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from varshare_rl.registry import register
from varshare_rl.transfer.bases import OneNetwork
from varshare_rl.transfer.method import ContinualMethodConfig, NetworkSpec, Pretrained, frozen_eval


@register("method", "frozen")
@dataclass
class FrozenConfig(ContinualMethodConfig):
    """``method=frozen``."""

    name: str = "frozen"

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> Frozen:
        """Make the method."""
        return Frozen(self, spec, pretrained)


class Frozen(OneNetwork):
    """One network that learns the first task and nothing after it; a pretrained agent's base learns nothing at all.

    The lower bound on what a later task must be worth, and the upper bound on remembering. From the second task on
    (the first with a pretrained agent) no parameter of the network that :meth:`begin` gives requires a gradient.
    """

    def begin(self, task: int, similar: int | None = None) -> nn.Module:
        """Make the network, to be trained only on the first task."""
        network = super().begin(task, similar)
        return network if self.pretrained is None and self.tasks == 0 else frozen_eval(network)
