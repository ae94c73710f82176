"""Fine-tuning: one network goes on learning, and nothing keeps what it knew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from varshare_rl.registry import register
from varshare_rl.transfer.method import ContinualMethodConfig, NetworkSpec, Pretrained
from varshare_rl.transfer.one_network import OneNetwork


@register("method", "finetune")
@dataclass
class FinetuneConfig(ContinualMethodConfig):
    """``method=finetune``."""

    keeps_parameters: ClassVar[bool] = True
    name: str = "finetune"

    def build(self, shape: NetworkSpec, pretrained: Pretrained | None = None) -> Finetune:
        """The method."""
        return Finetune(self, shape, pretrained)


class Finetune(OneNetwork):
    """One network for all tasks, trained on each in turn: the baseline that forgets."""
