"""Slow, obvious versions of the architectures: one task and, where it matters, one row and one expert at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from naive import weight_of
from torch import Tensor, nn

from varshare_rl.nn.care import CARENetwork
from varshare_rl.nn.film import FiLMNetwork
from varshare_rl.nn.mlp import BroNet, StackedLinear, StackedMLP, StackedNorm, TaskMLP, TaskNorm
from varshare_rl.nn.moore import MOORENetwork
from varshare_rl.nn.paco import PaCoNetwork
from varshare_rl.nn.soft_modularization import SoftModularizationNetwork


def naive_network(network: nn.Module, x: Tensor, task: int) -> Tensor:
    """Outputs of ``network``, whose activation is tanh, for the rows ``x [B, F]`` of one task, ``[B, G]``."""
    if isinstance(network, TaskMLP):
        return mlp(network, x, task)
    if isinstance(network, BroNet):
        return bronet(network, x, task)
    if isinstance(network, FiLMNetwork):
        return film(network, x, task)
    if isinstance(network, PaCoNetwork):
        return paco(network, x, task)
    if isinstance(network, MOORENetwork):
        return torch.stack([moore(network, row, task) for row in x])
    if isinstance(network, CARENetwork):
        return torch.stack([care(network, row, task) for row in x])
    assert isinstance(network, SoftModularizationNetwork)
    return torch.stack([soft_modularization(network, row, task) for row in x])


def normalized(norm: nn.Module, y: Tensor, copy: int = 0) -> Tensor:
    """``y [..., H]`` as the norm of a layer, or of one copy of a stacked one, leaves it."""
    if isinstance(norm, nn.Identity):
        return y
    standard = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    if isinstance(norm, StackedNorm | TaskNorm):
        return standard * norm.scales[copy] + norm.offsets[copy]
    assert isinstance(norm, nn.LayerNorm)
    return standard * norm.weight + norm.bias


def mlp(network: nn.Module, x: Tensor, task: int) -> Tensor:
    for layer, norm in zip(network.layers, network.norms, strict=False):
        x = torch.tanh(normalized(norm, F.linear(x, *weight_of(layer, task)), task))
    return F.linear(x, *weight_of(network.layers[-1], task))


def bronet(network: BroNet, x: Tensor, task: int) -> Tensor:
    *hidden, head = [weight_of(layer, task) for layer in network.layers]
    parts = [(norm, *linear) for norm, linear in zip(network.norms, hidden, strict=True)]
    first, blocks = parts[0], parts[1:]
    x = torch.tanh(normalized(first[0], F.linear(x, *first[1:]), task))
    for (norm, *linear), (norm_2, *linear_2) in zip(blocks[::2], blocks[1::2], strict=True):
        inner = torch.tanh(normalized(norm, F.linear(x, *linear), task))
        x = x + normalized(norm_2, F.linear(inner, *linear_2), task)
    return F.linear(x, *head)


def stacked(layer: nn.Module, x: Tensor, copy: int) -> Tensor:
    assert isinstance(layer, StackedLinear)
    return F.linear(x, layer.weights[copy], layer.biases[copy])


def stacked_mlp(network: StackedMLP, x: Tensor, copy: int) -> Tensor:
    for layer, norm in zip(network.layers, network.norms, strict=False):
        x = torch.tanh(normalized(norm, stacked(layer, x, copy), copy))
    return stacked(network.layers[-1], x, copy)


def film(network: FiLMNetwork, x: Tensor, task: int) -> Tensor:
    for layer, norm, modulation in zip(network.layers, network.norms, network.modulations, strict=False):
        h = normalized(norm, F.linear(x, *weight_of(layer, task)))
        x = torch.tanh((1 + modulation.scales[task]) * h + modulation.shifts[task])
    return F.linear(x, *weight_of(network.layers[-1], task))


def paco(network: PaCoNetwork, x: Tensor, task: int) -> Tensor:
    for index, layer in enumerate(network.layers):
        weight = sum(share * one for share, one in zip(network.compositions[task], layer.weights, strict=True))
        bias = sum(share * one for share, one in zip(network.compositions[task], layer.biases, strict=True))
        if index > 0:
            x = torch.tanh(normalized(network.norms[index - 1], x))
        x = F.linear(x, weight, bias)
    return x


def moore(network: MOORENetwork, row: Tensor, task: int) -> Tensor:
    basis: list[Tensor] = []
    for expert in range(network.mixtures.shape[1]):
        vector = stacked_mlp(network.experts, row, expert)
        rest = vector - sum((vector @ known * known for known in basis), torch.zeros_like(vector))
        basis.append(rest / rest.square().sum().sqrt())
    mixed = sum(share * vector for share, vector in zip(network.mixtures[task], basis, strict=True))
    return F.linear(torch.tanh(normalized(network.norm, mixed)), *weight_of(network.head, task))


def care(network: CARENetwork, row: Tensor, task: int) -> Tensor:
    context = mlp(network.context_encoder, network.embeddings[task], task)
    scores = mlp(network.attention, context, task)
    attention = [score.exp() / scores.exp().sum() for score in scores]
    encoding = sum(share * stacked_mlp(network.encoders, row, index) for index, share in enumerate(attention))
    return mlp(network.trunk, torch.cat([encoding, context]), task)


def soft_modularization(network: SoftModularizationNetwork, row: Tensor, task: int) -> Tensor:
    modules = network.num_modules
    features = mlp(network.encoder, row, task)
    gate = features * network.embeddings[task]
    into = [torch.tanh(features)] * modules
    before: list[Tensor] = []
    for index, layer in enumerate(network.modules_by_layer):
        condition = gate
        if index > 0:
            condition = F.linear(torch.cat(before), *weight_of(network.conditions[index - 1], task)) * gate
        logits = F.linear(torch.tanh(condition), *weight_of(network.routes[index], task))
        out = [
            torch.tanh(normalized(network.norms[index], stacked(layer, x, module), module))
            for module, x in enumerate(into)
        ]
        before = [part.exp() / part.exp().sum() for part in logits.split(modules)]
        into = [sum(share * y for share, y in zip(part, out, strict=True)) for part in before]
    assert len(into) == 1
    return F.linear(into[0], *weight_of(network.head, task))
