"""Learning tasks in a basis: put it into a model, train coefficients, take them out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter
from varshare_rl.adapters.targets import (
    is_conv1d,
    linear_weight,
    listed,
    made_weight,
    nesting_encoders,
    put_in_place,
    refusal,
)
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded, check_bounds
from varshare_rl.nn.layer import TaskLayer
from varshare_rl.transfer.share.coefficients import GaussianCoefficients, PointCoefficients
from varshare_rl.transfer.share.config import THIRD, check_columns, new_columns
from varshare_rl.transfer.share.layer import ShareLinear, share_layers
from varshare_rl.transfer.share.layer_basis import Coefficients, LayerBasis
from varshare_rl.transfer.share.model import Share
from varshare_rl.transfer.share.posterior import plain_prior, prior_from_tasks


@dataclass
class LearnConfig:
    """Learning of tasks in a basis."""

    p: Any = THIRD
    """Columns of the coefficients: a number, `third` of the largest rank among the basis's tasks, or null for all
    of it, as posteriors and temporary directions have it anyway."""
    phi: int | None = bounded(None, least=1)
    """Temporary directions, at most a quarter of `k`; null: coefficients only. A layer with a small `k` takes a
    quarter of its own, and one at least."""
    variational: bool = False
    "Coefficients with Gaussian posteriors, whose prior comes from the basis's tasks."
    prior_scale: float = bounded(1.0, above=0)
    "Standard deviation of the prior without earlier tasks."
    prior_tasks: float = bounded(1.0, above=0)
    "Tasks that this prior counts for beside the earlier ones."

    def check(self, prefix: str) -> None:
        """Raise UserError for columns that cannot be, and for temporary directions with a posterior."""
        check_columns(self.p, prefix)
        if self.phi is not None and self.variational:
            raise UserError(
                f"{prefix}phi and {prefix}variational=true are both given; temporary directions have no posterior"
            )


def attach(
    module: nn.Module, share: Share, config: LearnConfig, tasks: Sequence[str] = (), fresh: int = 0
) -> dict[str, ShareLinear]:
    """Replace the linear modules that a basis is for, in place.

    Their task ids are ``0, 1, ...`` for ``tasks`` in the order given, with the coefficients that the basis has,
    then for ``fresh`` new ones. Earlier tasks that are not named take no part, except that the prior comes from all
    of them. Of a layer of this project (``theta``) the shared weight stays and everything else goes.

    Args:
        module: any model with the basis's modules, as ``nn.Linear``, Conv1D of `transformers` or task layers, under
            the same paths.
        share: a basis of ``method=share`` or ``paper``.
        config: how the coefficients are learnt.
        tasks: tasks to go on with (fine-tuning, evaluation).
        fresh: number of new tasks.

    Returns:
        The new layers by path.

    Raises:
        UserError: the model does not have the modules, or the options cannot be.
    """
    check_bounds(config)
    if len(tasks) + fresh == 0:
        raise UserError("no tasks to attach; name some of the basis's, or give a number of fresh ones")
    if config.phi is not None and (tasks or fresh != 1):
        raise UserError("phi is given: temporary directions are for one fresh task at a time")
    indices = [share.index(task) for task in tasks]
    bases = _bases(share)
    linear = {name: _linear(module, name, basis) for name, basis in bases.items()}  # all of them, before any change
    p = _columns(share, config)
    largest = max(basis.k for basis in bases.values())
    if config.phi is not None and config.phi > max(1, largest // 4):
        raise UserError(f"phi is {config.phi}; with k = {largest} it must be between 1 and {max(1, largest // 4)}")
    layers, new = {}, {}
    for name, basis in bases.items():
        replaced, theta, bias = linear[name]
        layer = ShareLinear(
            theta, bias, basis.basis_B, basis.basis_A, _coefficients(basis, indices, fresh, p, config)
        )
        if config.phi is not None:
            layer.learn_temporarily(0, min(config.phi, max(1, basis.k // 4)), p)
        layer.train(replaced.training)
        layers[name] = layer
        new[replaced] = layer
    put_in_place(module, new)
    for encoder in nesting_encoders(module, layers.values()):
        encoder.use_nested_tensor = False
    return layers


def take_coefficients(module: nn.Module, task_id: int) -> dict[str, Coefficients]:
    """Return a task's coefficients by layer, for :func:`~varshare_rl.transfer.share.model.put_coefficients`."""
    return {name: layer.coefficients.take(task_id) for name, layer in share_layers(module)}


def take_adapter(module: nn.Module, task_id: int) -> Adapter:
    """Return a task's corrections as an adapter, temporary directions included, for a merge."""
    return {name: layer.correction(task_id) for name, layer in share_layers(module)}


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters of a basis's layers: coefficients, or temporary directions with theirs."""
    return [
        parameter
        for _, layer in share_layers(module)
        for parameter in layer.parameters()
        if parameter.requires_grad
    ]


def fine_tune(
    module: nn.Module, loss: Callable[[], Tensor], updates: int, learning_rate: float = 1e-2
) -> list[float]:
    """Adam on what :func:`trained_parameters` gives and on nothing else; returns the loss at every update.

    Used on merged tasks this is the published method's variant "Share-full".
    """
    parameters = trained_parameters(module)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    losses = []
    for _ in range(updates):
        value = loss()
        grads = torch.autograd.grad(value, parameters, allow_unused=True)  # rhos are unused in eval mode
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        losses.append(float(value.detach()))
    optimizer.zero_grad()
    return losses


def _bases(share: Share) -> dict[str, LayerBasis]:
    bases = {}
    for name, layer in share.layers.items():
        if not isinstance(layer, LayerBasis):
            raise UserError("tasks are learnt in the bases of method=share or paper, not in those of delta")
        bases[name] = layer
    return bases


def _linear(module: nn.Module, name: str, basis: LayerBasis) -> tuple[nn.Module, Tensor, Tensor | None]:
    """Return the module that a basis is for, its weight ``[out, in]`` and its bias."""
    modules = dict(module.named_modules(remove_duplicate=False))
    found = modules.get(name)
    if found is None:
        linear = [path for path, child in modules.items() if _is_task_layer(child) or refusal(child) is None]
        raise UserError(
            f"the model has no linear module {name!r}, which the basis is for; it has {listed(linear) or 'none'}"
        )
    if _is_task_layer(found):
        weight, bias = found.theta, found.bias
    else:
        _check_plain(name, found)
        weight, bias = linear_weight(found), found.bias
    assert isinstance(weight, Tensor)
    if tuple(weight.shape) != basis.features:
        out, into = basis.features
        raise UserError(
            f"module {name} has a weight of {weight.shape[0]} x {weight.shape[1]}, the basis is for {out} x {into}"
        )
    return found, weight, cast(Tensor | None, bias)


def _is_task_layer(module: nn.Module) -> bool:
    return isinstance(module, TaskLayer) and isinstance(getattr(module, "theta", None), Tensor)


def _check_plain(name: str, module: nn.Module) -> None:
    """Refuse a module that does more than to multiply with its weight, which is all that is taken over."""
    reason = refusal(module)
    if reason is None and made_weight(module):
        reason = "whose weight is made anew at every call (weight_norm, prune, ...); make it permanent before"
    if reason is None and (module._forward_hooks or module._forward_pre_hooks):
        reason = "which has forward hooks; remove them, and put them on what comes in its place"
    if reason is None and type(module) is not nn.Linear and not is_conv1d(module):
        reason = f"a {type(module).__name__}, whose own forward would be lost; give a plain nn.Linear"
    if reason is not None:
        raise UserError(f"the basis is for module {name}, {reason}")


def _columns(share: Share, config: LearnConfig) -> int:
    ranks = [own.eps_B.shape[1] for layer in _bases(share).values() for own in layer.coefficients]
    if config.variational and isinstance(config.p, int) and config.p < max(ranks):
        raise UserError(f"p is {config.p}, and the prior comes from tasks of rank up to {max(ranks)}; leave p out")
    return new_columns(config.p, ranks, whole=config.variational or config.phi is not None)


def _coefficients(
    basis: LayerBasis, indices: Sequence[int], fresh: int, p: int, config: LearnConfig
) -> PointCoefficients | GaussianCoefficients:
    p = max([p, *(basis.coefficients[index].eps_B.shape[1] for index in indices)])
    k_B, k_A, count = basis.basis_B.shape[1], basis.basis_A.shape[1], len(indices) + fresh
    made: PointCoefficients | GaussianCoefficients
    if config.variational:
        held, scale = basis.coefficients, config.prior_scale
        prior = prior_from_tasks(held, p, scale, config.prior_tasks) if held else plain_prior(k_B, k_A, p, scale)
        made = GaussianCoefficients(count, prior)
    else:
        made = PointCoefficients(count, k_B, k_A, p)
    for position, index in enumerate(indices):
        made.put(position, basis.coefficients[index])
    return made
