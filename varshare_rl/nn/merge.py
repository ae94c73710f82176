"""Plain networks: one task's network or policy as an ``nn.Sequential`` of PyTorch's own layers.

The mean of a linear layer's weight is itself a weight, so what a trained agent computes for one task on the
posterior mean is an ordinary multilayer perceptron, which needs nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from varshare_rl.errors import UserError
from varshare_rl.nn.actor import CategoricalActor, TanhGaussianActor
from varshare_rl.nn.layer import TaskLayer, plain_linear
from varshare_rl.nn.mlp import ACTIVATIONS, LEAKY_SLOPE, SharedLayerNorm, TaskMLP, TaskNorm

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
    """Plain network that computes what ``network`` does for ``task`` on the posterior mean; parameters are copies.

    Every layer folds its own weight, see :meth:`~varshare_rl.nn.layer.TaskLayer.mean_linear`.

    Raises:
        IndexError: an unknown task id.
        UserError: the network's function for one task is not a multilayer perceptron that we know of.
    """

    def linear(layer: TaskLayer) -> nn.Linear:
        layer.check_task(task)
        return layer.mean_linear(task)

    return plain_network(network, linear, task)


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
    last = plain_linear(
        head.weight[:actions] * allowed.unsqueeze(1),
        head.bias[:actions].masked_fill(~allowed, 0.0 if isinstance(actor, TanhGaussianActor) else _NEVER),
    )
    end = nn.Tanh() if isinstance(actor, TanhGaussianActor) else Choose()
    return nn.Sequential(*list(network)[:-1], last, end).eval()


def plain_network(network: nn.Module, linear: Callable[[TaskLayer], nn.Linear], task: int = 0) -> nn.Sequential:
    """``network`` with what ``linear`` makes of them in place of its task layers, in eval mode.

    Norms are those of ``task``, where tasks have their own.

    Raises:
        UserError: the network is not a :class:`~varshare_rl.nn.mlp.TaskMLP` of task layers.
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
    layers = []
    for layer in network.layers:
        if not isinstance(layer, TaskLayer):
            raise UserError(f"a {type(layer).__name__} has no weight of one task to fold; a TaskLayer may have one")
        layers.append(linear(layer))
    for plain, norm in zip(layers, network.norms, strict=False):
        modules.append(plain)
        if isinstance(norm, SharedLayerNorm | TaskNorm):
            modules.append(norm.task_norm(task))
        modules.append(activation())
    return nn.Sequential(*modules, layers[-1]).eval()
