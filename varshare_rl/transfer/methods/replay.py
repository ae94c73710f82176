"""Replay: the network's behaviour on earlier tasks is part of its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.fields import bounded
from varshare_rl.registry import register
from varshare_rl.transfer.bases import OneNetwork
from varshare_rl.transfer.method import ContinualMethodConfig, NetworkSpec, Pretrained, StorageCost, tensor_bytes
from varshare_rl.types import Tree


@register("method", "replay")
@dataclass
class ExperienceReplayConfig(ContinualMethodConfig):
    """``method=replay``."""

    keeps_parameters: ClassVar[bool] = True
    name: str = "replay"
    weight: float = bounded(1.0, least=0)
    "Weight of the penalty."
    samples_per_task: int = bounded(1000, least=1)
    "Observations kept of every task, with the network's outputs."
    batch: int = bounded(128, least=1)
    "Observations drawn for every penalty, with replacement."

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> ExperienceReplay:
        """Make the method."""
        return ExperienceReplay(self, spec, pretrained)


class ExperienceReplay(OneNetwork):
    """One network that goes on doing on earlier tasks' inputs what it did there: behaviour cloning.

    ``penalty = weight mean_n KL(p_old(. | x_n) || p(. | x_n))`` over a batch of the inputs kept of all earlier
    tasks, with ``p_old`` what the network gave at the end of the input's task: the cloning loss of CLEAR (Rolnick
    et al. 2019) on samples kept at a task's end, as on Continual World (Wolczyk et al. 2021) in Wolczyk et al.
    2022, *Disentangling Transfer in Continual Reinforcement Learning*. CLEAR's replay of rewards is no part of it.

    Of a pretrained agent's tasks no samples are there: its base is where learning starts, and
    nothing is replayed of them.
    """

    state_fields = ("inputs", "outputs")

    def __init__(
        self, config: ExperienceReplayConfig, spec: NetworkSpec, pretrained: Pretrained | None = None
    ) -> None:
        super().__init__(config, spec, pretrained)
        self.inputs = torch.empty(1, 0, spec.in_features)  # of all earlier tasks, [1, M, F]
        self.outputs = spec.likelihood.complete(torch.empty(1, 0, spec.out_features))  # [1, M, P]

    def penalty(self, network: nn.Module, transitions: int) -> Tensor | float:
        """Return ``weight`` times the mean divergence on a batch, ``[1]``."""
        kept = self.inputs.shape[1]
        if kept == 0:
            return 0.0
        device = next(network.parameters()).device
        self.inputs, self.outputs = self.inputs.to(device), self.outputs.to(device)
        chosen = torch.randint(kept, (self.config.batch,)).to(device)
        now = network(self.inputs[:, chosen], torch.zeros(1, dtype=torch.int64))
        divergence = self.spec.likelihood.divergence(self.outputs[:, chosen], now)
        penalty: Tensor = self.config.weight * divergence.mean(1)
        return penalty

    @torch.no_grad()
    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the weights, and some inputs with the network's outputs for them."""
        super().end(network, inputs)
        chosen = torch.randperm(inputs.shape[1])[: self.config.samples_per_task].to(inputs.device)
        inputs = inputs[:, chosen]
        outputs = self.spec.likelihood.complete(network(inputs, torch.zeros(1, dtype=torch.int64)))
        self.inputs = torch.cat([self.inputs.to(inputs), inputs], dim=1)
        self.outputs = torch.cat([self.outputs.to(outputs), outputs], dim=1)

    def load_state(self, state: Tree) -> None:
        super().load_state(state)
        self.outputs = self.spec.likelihood.complete(self.outputs)  # former versions kept outputs alone

    def stored(self) -> StorageCost:
        """Return the bytes of one network; the samples are memory."""
        return super().stored() + StorageCost(memory=tensor_bytes(self.inputs, self.outputs))
