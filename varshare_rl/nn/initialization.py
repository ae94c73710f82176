"""Initial values of a network's linear layers, where they are not those of ``torch.nn.Linear``."""

from __future__ import annotations

import math

import torch
from torch import nn

from varshare_rl.nn.config import Initialization, NetworkConfig
from varshare_rl.nn.layer import TaskLayer
from varshare_rl.nn.mlp import StackedLinear

#: Gain of orthogonal hidden layers, whatever their activation (Engstrom et al. 2020 and OpenAI Baselines).
HIDDEN_GAIN = math.sqrt(2.0)


@torch.no_grad()
def initialize(network: nn.Module, config: NetworkConfig) -> None:
    """Give linear layers the initial values that ``config`` asks for; the last one makes the outputs.

    A weight of every task or copy is orthogonal by itself (Saxe et al. 2014). Corrections stay as they are.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, TaskLayer | StackedLinear)]
    orthogonal = config.initialization is Initialization.orthogonal
    for layer in layers:
        last = layer is layers[-1]
        weight, bias = layer.linear_parameters()
        if orthogonal:
            for one in weight.view(-1, *weight.shape[-2:]):
                nn.init.orthogonal_(one, 1.0 if last else HIDDEN_GAIN)
            if bias is not None:
                bias.zero_()
        if last and config.output_gain != 1.0:
            weight.mul_(config.output_gain)
            if bias is not None:
                bias.mul_(config.output_gain)
