"""Plain networks: one task's network or policy as an ``nn.Sequential`` of PyTorch's own layers.

The mean of a linear layer's weight is itself a weight, so what a trained agent computes for one task on the
posterior mean is an ordinary multilayer perceptron, which needs nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varshare_rl.errors import UserError
from varshare_rl.nn.actor import CategoricalActor, TanhGaussianActor
from varshare_rl.nn.independent import IndependentLayer
from varshare_rl.nn.lora import L2SoftLayer, ResidualLayer
from varshare_rl.nn.mlp import TaskMLP
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.nn.task_embedding import TaskEmbeddingLayer
from varshare_rl.nn.varshare import VarShareLayer
from varshare_rl.nn.varshare_lora import VarShareLoRALayer
from varshare_rl.ops.activations import ACTIVATIONS, LEAKY_SLOPE

#: Weight ``[G, F]`` and bias ``[G]``.
WeightBias = tuple[Tensor, Tensor | None]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "leaky_relu": partial(nn.LeakyReLU, LEAKY_SLOPE),
}
#: Logit of a choice that the task does not have, as in ``ops.policy.masked_logits``.
_NEVER = -1e8


class Normalize(nn.Module):
    """``clip((x - mean) / std)``: an observation normaliser of one task that has stopped learning.

    Args:
        mean: ``[F]``; std: ``[F]``; clip: bound on the result.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, clip: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("std", std.detach().clone())
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        """``[..., F]`` to ``[..., F]``."""
        return ((x - self.mean) / self.std).clamp(-self.clip, self.clip)


class Choose(nn.Module):
    """The index of the largest logit, the deterministic action of a categorical policy."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., A]`` to ``[...]`` int64."""
        return x.argmax(-1)


def merged(network: nn.Module, task: int) -> nn.Sequential:
    """What ``network`` computes for ``task`` on the posterior mean, as a plain network; parameters are copies.

    ``W_i`` is folded: ``theta + (alpha / r) mu_B mu_A`` for VarShare-LoRA, ``theta + mu`` for VarShare, the same
    with the residuals themselves for LoRA and L2-soft, what a one-hot or an embedding adds in the bias, the task's
    own weight for independent networks and heads.

    Raises:
        IndexError: an unknown task id.
        UserError: the network's function for one task is not a multilayer perceptron that we know of.
    """

    def weights(layer: nn.Module) -> WeightBias:
        known = getattr(layer, "one_hot_tasks", 0) or getattr(layer, "num_tasks", None)
        if known and not 0 <= task < known:
            raise IndexError(f"unknown task id {task}: this network has {known} tasks (0 to {known - 1})")
        if type(layer) not in _MEAN_WEIGHTS:
            raise UserError(
                f"a {type(layer).__name__} has no weight of one task to fold; layers that have are "
                f"{', '.join(kind.__name__ for kind in _MEAN_WEIGHTS)}"
            )
        return _MEAN_WEIGHTS[type(layer)](layer, task)

    return plain_network(network, weights)


def merged_policy(actor: nn.Module, task: int) -> nn.Sequential:
    """The deterministic policy of ``task`` on the posterior mean: normalised observations to actions.

    Actions are ``tanh(mean)`` in ``[-1, 1]``, or the index of a choice; dimensions and choices that the task
    does not have are 0 and never taken.

    Raises:
        IndexError: an unknown task id.
        UserError: the actor or its network is of another kind, see :func:`merged`.
    """
    if not isinstance(actor, TanhGaussianActor | CategoricalActor):
        raise UserError(f"a {type(actor).__name__} has no plain form; TanhGaussianActor and CategoricalActor have")
    network = merged(actor.network, task)
    allowed = actor.action_mask[task, 0].bool()  # [A]
    head = network[-1]
    assert isinstance(head, nn.Linear)
    actions = len(allowed)  # of the squashed Gaussian's outputs the means come first
    last = _linear(
        head.weight[:actions] * allowed.unsqueeze(1),
        head.bias[:actions].masked_fill(~allowed, 0.0 if isinstance(actor, TanhGaussianActor) else _NEVER),
    )
    end = nn.Tanh() if isinstance(actor, TanhGaussianActor) else Choose()
    return nn.Sequential(*list(network)[:-1], last, end).eval()


def plain_network(network: nn.Module, weights: Callable[[nn.Module], WeightBias]) -> nn.Sequential:
    """``network`` with ``nn.Linear`` of the given ``weights`` in place of its task layers, in eval mode.

    Raises:
        UserError: the network is not a :class:`~varshare_rl.nn.mlp.TaskMLP`.
    """
    if type(network) is not TaskMLP:
        raise UserError(
            f"a {type(network).__name__} has no plain form: only networks that are a multilayer perceptron for "
            "each task have one (blocks=mlp; network=varshare_lora, varshare, l2_soft, lora, shared, "
            "task_embedding, multi_head or independent)"
        )
    names = {function: name for name, function in ACTIVATIONS.items()}
    activation = _ACTIVATIONS.get(names.get(network.activation, ""))
    if activation is None:
        raise UserError(f"the activation {network.activation!r} has no module of its own in torch.nn")
    modules: list[nn.Module] = []
    layers = [_linear(*weights(layer)) for layer in network.layers]
    for layer, norm in zip(layers, network.norms, strict=False):
        modules.append(layer)
        if isinstance(norm, nn.LayerNorm):
            modules.append(_copy_norm(norm))
        modules.append(activation())
    return nn.Sequential(*modules, layers[-1]).eval()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _copy_norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    copy = nn.LayerNorm(norm.normalized_shape, norm.eps, device=norm.weight.device, dtype=norm.weight.dtype)
    copy.load_state_dict(norm.state_dict())
    return copy


def _shared(layer: SharedLayer, task: int) -> WeightBias:
    size = layer.in_features
    hot = layer.theta[:, size + task] if layer.one_hot_tasks else 0.0
    return layer.theta[:, :size], layer.bias + hot


def _independent(layer: IndependentLayer, task: int) -> WeightBias:
    return layer.weights[task], layer.biases[task]


def _task_embedding(layer: TaskEmbeddingLayer, task: int) -> WeightBias:
    size = layer.in_features
    return layer.theta[:, :size], layer.bias + layer.theta[:, size:] @ F.normalize(layer.embeddings[task], dim=-1)


def _residual(layer: ResidualLayer, task: int) -> WeightBias:
    if layer.rank is None:
        return layer.theta + layer.residuals[task], layer.bias
    return torch.addmm(layer.theta, layer.factors_B[task], layer.factors_A[task], alpha=layer.scale), layer.bias


def _varshare(layer: VarShareLayer, task: int) -> WeightBias:
    return layer.theta + layer.mus[task], layer.bias


def _varshare_lora(layer: VarShareLoRALayer, task: int) -> WeightBias:
    return torch.addmm(layer.theta, layer.mus_B[task], layer.mus_A[task], alpha=layer.scale), layer.bias


#: How each kind of layer gives its mean weight and bias for one task.
_MEAN_WEIGHTS: dict[type[nn.Module], Callable[[Any, int], WeightBias]] = {
    SharedLayer: _shared,
    IndependentLayer: _independent,
    TaskEmbeddingLayer: _task_embedding,
    ResidualLayer: _residual,
    L2SoftLayer: _residual,
    VarShareLayer: _varshare,
    VarShareLoRALayer: _varshare_lora,
}
