"""Elastic weight consolidation: weights that mattered to earlier tasks are held where these left them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from varshare_rl.fields import bounded
from varshare_rl.registry import register
from varshare_rl.transfer.bases import OneNetwork
from varshare_rl.transfer.method import (
    ContinualMethodConfig,
    Likelihood,
    NetworkSpec,
    Pretrained,
    StorageCost,
    state_bytes,
)
from varshare_rl.types import Tree


@register("method", "ewc")
@dataclass
class EWCConfig(ContinualMethodConfig):
    """``method=ewc``."""

    keeps_parameters: ClassVar[bool] = True
    name: str = "ewc"
    weight: float = bounded(1e4, least=0)
    "Weight of the penalty, the paper's lambda."
    fisher_samples: int = bounded(500, least=1)
    "Observations that a task's Fisher information is averaged over."
    online: bool = False
    "One running importance around the latest weights, instead of one per task."
    decay: float = bounded(0.95, least=0, most=1)
    "Factor on the running importance when a task is added, with `online`."

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> EWC:
        """Make the method."""
        return EWC(self, spec, pretrained)


@dataclass(frozen=True)
class Quadratic:
    """``offset + sum_k precision_k (theta_k - centre_k)^2``, by parameter name."""

    precision: Mapping[str, Tensor]
    centre: Mapping[str, Tensor]
    offset: float = 0.0

    def __call__(self, network: nn.Module) -> Tensor:
        """Return its value at the parameters of a network, 0-d."""
        parts = [
            (self.precision[name] * (parameter - self.centre[name]).square()).sum()
            for name, parameter in network.named_parameters()
        ]
        return torch.stack(parts).sum() + self.offset

    def to(self, device: torch.device) -> Quadratic:
        """Return the same on a device."""
        precision = {name: value.to(device) for name, value in self.precision.items()}
        return Quadratic(precision, {name: value.to(device) for name, value in self.centre.items()}, self.offset)

    def plus(self, other: Quadratic) -> Quadratic:
        """Return the sum of both, which is one quadratic again.

        ``p (x - a)^2 + q (x - b)^2 = (p + q) (x - c)^2 + p q / (p + q) (a - b)^2`` with
        ``c = (p a + q b) / (p + q)``.
        """
        precision, centre, offset = {}, {}, self.offset + other.offset
        for name, p in self.precision.items():
            q, away = other.precision[name], other.centre[name] - self.centre[name]
            precision[name] = p + q
            share = torch.where(p + q > 0, q / (p + q), 0.0)  # where both are 0, c may be anything
            centre[name] = self.centre[name] + share * away
            offset += float((p * share * away.square()).sum())
        return Quadratic(precision, centre, offset)


class EWC(OneNetwork):
    """One network, drawn to the weights that earlier tasks needed (Kirkpatrick et al. 2017, equation 3).

    ``penalty = weight / 2 sum_i sum_k F_ik (theta_k - theta*_ik)^2`` over the earlier tasks ``i``, with
    ``theta*_i`` the weights and ``F_i`` the diagonal Fisher information at the end of task ``i``. All these
    quadratics are kept as the one that they add up to, so memory does not grow. ``online``: ``F <- decay F + F_i``
    around the latest weights instead (Schwarz et al. 2018, section 4).

    Of a pretrained agent's tasks no inputs are there to measure importance on: its base is where learning starts,
    and nothing holds it there.
    """

    def __init__(self, config: EWCConfig, spec: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, spec, pretrained)
        self.quadratic: Quadratic | None = None

    def penalty(self, network: nn.Module, transitions: int) -> Tensor | float:
        """Return ``weight / 2`` times the quadratic, ``[1]``."""
        if self.quadratic is None:
            return 0.0
        device = next(network.parameters()).device
        if next(iter(self.quadratic.centre.values())).device != device:
            self.quadratic = self.quadratic.to(device)  # once, after a state was loaded
        penalty: Tensor = 0.5 * self.config.weight * self.quadratic(network).reshape(1)
        return penalty

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the weights, and add their importance for this task."""
        config = self.config
        chosen = torch.randperm(inputs.shape[1])[: config.fisher_samples].to(inputs.device)
        fisher = diagonal_fisher(network, inputs[:, chosen], self.spec.likelihood)
        super().end(network, inputs)
        centre = {name: self.weights[name] for name in fisher}
        new = Quadratic(fisher, centre)
        if self.quadratic is not None:
            old = self.quadratic.to(inputs.device)
            running = {name: config.decay * old.precision[name] + value for name, value in fisher.items()}
            new = Quadratic(running, centre) if config.online else old.plus(new)
        self.quadratic = new

    def stored(self) -> StorageCost:
        """Return one network; importances are memory, and so is their centre where it is not the network itself."""
        memory = 0
        if self.quadratic is not None:
            memory = state_bytes(self.quadratic.precision)
            memory += 0 if self.config.online else state_bytes(self.quadratic.centre)
        return super().stored() + StorageCost(memory=memory)

    def state(self) -> Tree:
        """Return weights and quadratic."""
        return {**super().state(), "quadratic": None if self.quadratic is None else dict(vars(self.quadratic))}

    def load_state(self, state: Tree) -> None:
        super().load_state(state)
        self.quadratic = None if state["quadratic"] is None else Quadratic(**state["quadratic"])


def diagonal_fisher(network: nn.Module, inputs: Tensor, likelihood: Likelihood) -> dict[str, Tensor]:
    """Return ``F_k = mean_n (d log p(y_n | x_n) / d theta_k)^2``, ``y_n`` drawn from the network's distribution.

    The square is of each input's gradient, so inputs ``[1, N, F]`` are taken one at a time. By parameter name.
    """
    parameters = dict(network.named_parameters())
    fisher = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    task_ids = torch.zeros(1, dtype=torch.int64)
    count = inputs.shape[1]
    for row in range(count):
        log_prob = likelihood.sampled_log_prob(network(inputs[:, row : row + 1], task_ids)).sum()
        gradients = torch.autograd.grad(log_prob, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            fisher[name].addcmul_(gradient, gradient, value=1.0 / count)
    return fisher
