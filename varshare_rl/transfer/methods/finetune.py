"""Fine-tuning: one network goes on learning, and nothing keeps what it knew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from varshare_rl.registry import register
from varshare_rl.transfer.bases import OneNetwork
from varshare_rl.transfer.method import ContinualMethodConfig, NetworkSpec, Pretrained


@register("method", "finetune")
@dataclass
class FinetuneConfig(ContinualMethodConfig):
    """``method=finetune``."""

    keeps_parameters: ClassVar[bool] = True
    name: str = "finetune"

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> Finetune:
        """Make the method."""
        return Finetune(self, spec, pretrained)


class Finetune(OneNetwork):
    """One network for all tasks, trained on each in turn: the baseline that forgets."""
