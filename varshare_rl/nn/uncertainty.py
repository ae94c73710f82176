"""Predictive means and standard deviations of outputs from the posteriors over weights.

They are *epistemic* only: what the posterior leaves open about the weights. They know nothing of the noise in
rewards, dynamics or actions, of approximation error, or of states unlike those of training beyond what the weights'
scatter makes of them; and a posterior trained with ``kl_weight < 1`` is narrower than Bayes' by design.

Three ways, from exact to cheap:

- :func:`sample_outputs`: draws of the weights, all tasks and draws as blocks of one batched forward pass;
- :func:`layer_moments`: one linear layer in closed form, exact;
- :func:`linearised`: a whole network to first order in the weights, one forward and one backward pass per output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from varshare_rl.nn.actor import Actor, CategoricalActor
from varshare_rl.nn.critic import TwinQ, ValueNetwork
from varshare_rl.nn.layer import TaskLayer, posterior_layers
from varshare_rl.nn.stochastic import posterior_mean
from varshare_rl.nn.task_rows import TaskIds, all_tasks, task_rows
from varshare_rl.ops.gaussian import softplus_sigma

#: Turns what a module returns into a tensor ``[K, B, ...]``.
Read = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Prediction:
    """Moments over the posterior, and the draws they come from.

    Attributes:
        mean, std: ``[T, B, ...]``; std with the divisor ``P - 1``.
        draws: ``[P, T, B, ...]``.
    """

    mean: Tensor
    std: Tensor
    draws: Tensor


class Moments(NamedTuple):
    """Mean and variance, each ``[..., G]``."""

    mean: Tensor
    variance: Tensor


def draw_weights(module: nn.Module, draws: int, temperature: float = 1.0) -> dict[str, Tensor]:
    """Parameters and buffers of ``module`` for ``draws * T`` tasks, by dotted name, for ``functional_call``.

    Block ``p T + i`` is draw ``p`` of task ``i``'s posterior as a mean; what modules keep per task besides is
    repeated, parameters and the buffers that they name in ``per_task_buffers``. The module stays as it is; draws
    come from torch's global generator.
    """
    drawn: dict[str, Tensor] = {}
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        rhos = dict(getattr(child, "factors", ()))
        for name in getattr(child, "per_task_parameters", ()):
            if name in rhos.values():
                continue
            value = _repeat(child.get_parameter(name).detach(), draws)
            if name in rhos:
                rho = child.get_parameter(rhos[name]).detach()
                sigma = _repeat(softplus_sigma(rho, temperature), draws)
                value = torch.addcmul(value, sigma, torch.randn_like(value))
            drawn[prefix + name] = value
        for name in getattr(child, "per_task_buffers", ()):
            drawn[prefix + name] = _repeat(child.get_buffer(name), draws)
    return drawn


def _repeat(stacked: Tensor, draws: int) -> Tensor:
    return stacked.repeat(draws, *[1] * (stacked.dim() - 1))


@torch.no_grad()
def sample_outputs(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    draws: int,
    temperature: float = 1.0,
    read: Read = lambda output: output,
    at_once: int = 8,
) -> Prediction:
    """Outputs of ``module`` for all tasks under ``draws`` weights of each task's posterior.

    Every row of a task sees the same draws, so outputs of one draw belong to one function of the input.

    Args:
        module: called as ``module(*inputs, task_ids)``.
        inputs: each ``[T, B, F]``, all tasks in order.
        draws: their number, ``P``, at least 2.
        temperature: factor on every sigma.
        read: turns the module's output into a tensor ``[K, B, ...]``.
        at_once: draws in one forward pass; bounds the memory.

    Raises:
        ValueError: fewer than 2 draws, or nothing in ``module`` has a posterior.
    """
    if draws < 2:
        raise ValueError(f"draws is {draws}; a standard deviation needs at least 2")
    if not any(posterior_layers(module)):
        raise ValueError("no layer of this network has a posterior, so its outputs do not scatter")
    num_tasks = len(inputs[0])
    parts = []
    with posterior_mean(module):
        for start in range(0, draws, at_once):
            count = min(at_once, draws - start)
            blocks = tuple(_repeat(x, count) for x in inputs)
            ids = all_tasks(count * num_tasks)
            output = functional_call(module, draw_weights(module, count, temperature), (*blocks, ids))
            value = read(output)
            parts.append(value.view(count, num_tasks, *value.shape[1:]))
    drawn = torch.cat(parts)
    return Prediction(drawn.mean(0), drawn.std(0), drawn)


def predict_actions(
    actor: Actor, obs: Tensor, draws: int, temperature: float = 1.0, at_once: int = 8
) -> Prediction:
    """Deterministic actions ``[T, B, A]`` in [-1, 1] under draws of the weights; for Discrete actions the choices'
    probabilities. ``obs [T, B, F]`` as the actor takes them (normalised)."""
    if isinstance(actor, CategoricalActor):
        return sample_outputs(actor, (obs,), draws, temperature, lambda policy: policy.log_probs.exp(), at_once)
    return sample_outputs(actor, (obs,), draws, temperature, lambda policy: policy.mode(), at_once)


def predict_values(
    critic: ValueNetwork | TwinQ, inputs: tuple[Tensor, ...], draws: int, temperature: float = 1.0, at_once: int = 8
) -> Prediction:
    """Values ``[T, B]`` under draws of the critic's weights, in the units the critic was trained in.

    ``inputs`` are what the critic takes before the ids. Twin critics are two estimates of the same values with
    posteriors of their own: each draw of each of them counts as one, ``[2 P, T, B]``.
    """
    if isinstance(critic, ValueNetwork):
        return sample_outputs(critic, inputs, draws, temperature, at_once=at_once)
    twins = sample_outputs(critic, inputs, draws, temperature, lambda q: q.movedim(0, -1), at_once).draws
    drawn = twins.movedim(-1, 0).flatten(0, 1)
    return Prediction(drawn.mean(0), drawn.std(0), drawn)


@torch.no_grad()
def layer_moments(layer: TaskLayer, x: Tensor, task_id: TaskIds, temperature: float = 1.0) -> Moments:
    """Mean and variance of one layer's output over its posterior, exactly, for known inputs.

    Full rank: ``Var y_g = sum_f x_f^2 sigma_gf^2``. Low rank, in two stages since ``A`` and ``B`` are
    independent: ``z_k`` has mean ``mu_A x`` and variance ``sum_f x_f^2 sigma_A,kf^2``, and

        Var y_g = s^2 sum_k [ mu_B,gk^2 Var z_k + sigma_B,gk^2 E z_k^2 ]        E z_k^2 = Var z_k + (E z_k)^2

    with ``s`` the layer's scale. Layouts and errors are those of the layer's ``forward``.
    """
    with posterior_mean(layer):
        mean: Tensor = layer(x, task_id)
    rows = task_rows(x, task_id, layer.num_tasks)
    return Moments(mean, rows.restore(layer.output_variance(rows, temperature)))


def linearised(
    module: nn.Module, inputs: tuple[Tensor, ...], temperature: float = 1.0, read: Read = lambda output: output
) -> Moments:
    """Mean and variance of a network's outputs to first order in its layers' noise, for all tasks.

    With ``delta_l = d y / d y_l`` the sensitivity of output ``y`` to the output of layer ``l`` at the mean weights
    and ``x_l`` that layer's input there, and layers' weights independent,

        mean y = y(mean weights)        Var y = sum_l Var(delta_l . W_l x_l)

    where each layer's term is exact, its covariances between outputs included (the delta method, as in linearised
    Laplace approximations: Immer, Korzepa and Bauer 2021). One layer alone is therefore exact. Beyond the first
    order nothing is seen: no curvature of the activations and no products of two layers' noise, so the standard
    deviation is right while the weights' noise moves hidden units little, and the mean is never corrected.

    Args:
        module: called as ``module(*inputs, task_ids)``; rows must not depend on each other.
        inputs: each ``[T, B, F]``, all tasks in order.
        temperature: factor on every sigma.
        read: turns the module's output into a tensor ``[T, B]`` or ``[T, B, G]``.
    """
    seen: list[tuple[TaskLayer, Tensor, Tensor]] = []

    def note(layer: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        seen.append((layer, arguments[0], output))

    handles = [layer.register_forward_hook(note) for _, layer in posterior_layers(module)]
    try:
        with posterior_mean(module), torch.enable_grad():  # gradients to every layer, frozen weights or not
            tracked = tuple(x.detach().clone().requires_grad_() for x in inputs)
            y = read(module(*tracked, all_tasks(len(inputs[0]))))
    finally:
        for handle in handles:
            handle.remove()
    flat = y.unsqueeze(-1) if y.dim() == 2 else y
    outputs = [output for _, _, output in seen]
    columns = []
    for column in range(flat.shape[-1]):
        slopes = torch.autograd.grad(
            flat[..., column].sum(), outputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            terms = [
                layer.projected_variance(x.detach(), slope, temperature)
                for (layer, x, _), slope in zip(seen, slopes, strict=True)
            ]
            columns.append(torch.stack(terms).sum(0))
    return Moments(y.detach(), torch.stack(columns, -1).view_as(y))
