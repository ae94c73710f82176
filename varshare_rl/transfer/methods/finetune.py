"""Fine-tuning: one network goes on learning, and nothing keeps what it knew."""

from __future__ import annotations

from dataclasses import dataclass

from varshare_rl.transfer.bases import OneNetwork
from varshare_rl.transfer.method import ContinualMethodConfig


@dataclass
class FinetuneConfig(ContinualMethodConfig):
    """``method=finetune``."""

    name: str = "finetune"


class Finetune(OneNetwork):
    """One network for all tasks, trained on each in turn: the baseline that forgets."""
