"""Slow, obvious versions of the task layers: one task at a time, its weight built in full."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varshare_rl.nn import (
    IndependentLayer,
    ResidualLayer,
    SharedLayer,
    TaskEmbeddingLayer,
    VarShareLayer,
    VarShareLoRALayer,
)


def weight_of(layer: nn.Module, task: int, temperature: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Weight ``[G, F]`` and bias of one task: of the held noise in training mode, else of the means."""
    if isinstance(layer, IndependentLayer):
        return layer.weights[task], layer.biases[task]
    if isinstance(layer, SharedLayer):
        theta, bias = layer.theta[:, : layer.in_features], layer.bias
        return theta, bias if layer.one_hot_tasks == 0 else bias + layer.theta[:, layer.in_features + task]
    if isinstance(layer, TaskEmbeddingLayer):
        embedding = layer.embeddings[task] / layer.embeddings[task].square().sum().sqrt()
        appended = layer.theta[:, layer.in_features :]
        return layer.theta[:, : layer.in_features], layer.bias + appended @ embedding
    if isinstance(layer, ResidualLayer):
        if layer.rank is None:
            return layer.theta + layer.residuals[task], layer.bias
        return layer.theta + layer.scale * layer.factors_B[task] @ layer.factors_A[task], layer.bias
    noisy = layer.training and layer.noise is not None
    if isinstance(layer, VarShareLayer):
        phi = layer.mus[task]
        if noisy:
            phi = phi + F.softplus(layer.rhos[task]) * temperature * layer.noise.values[0][task]
        return layer.theta + phi, layer.bias
    assert isinstance(layer, VarShareLoRALayer)
    a, b = layer.mus_A[task], layer.mus_B[task]
    if noisy:
        a = a + F.softplus(layer.rhos_A[task]) * temperature * layer.noise.values[0][task]
        b = b + F.softplus(layer.rhos_B[task]) * temperature * layer.noise.values[1][task]
    return layer.theta + layer.scale * b @ a, layer.bias


def naive_layer(layer: nn.Module, x: Tensor, ids: list[int] | int, temperature: float = 1.0) -> Tensor:
    """The layer's output in any of the three layouts."""
    if isinstance(ids, int):
        return F.linear(x, *weight_of(layer, ids, temperature))
    rows = [F.linear(row, *weight_of(layer, task, temperature)) for row, task in zip(x, ids, strict=True)]
    return torch.stack(rows)


def scramble(module: nn.Module) -> None:
    """Give every parameter a value of ordinary size, so that no term is too small to be missed."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5 - (0.5 if "rho" in name else 0.0))
