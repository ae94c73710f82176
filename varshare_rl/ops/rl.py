"""Quantities of reinforcement learning: advantages, targets, policies and losses. Losses are one number per task.

Actions a task does not have (padding of a suite with unlike action spaces) carry ``mask`` False: they
contribute nothing to log-probabilities and are never chosen.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varshare_rl.ops.gaussian import normal_log_prob


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    discount: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) along dimension 1.

    ``delta = reward + discount * (1 - terminated) * next_value - value`` and
    ``advantage_s = delta_s + discount * gae_lambda * (1 - terminated - truncated) * advantage_{s+1}``.
    ``next_value`` is the value of the true successor, so a time limit bootstraps and a real end does not;
    both stop the sum. All arguments ``[T, S, E]`` with ``S`` vector steps; returns ``[T, S, E]``, without a graph.

    The sum runs on the CPU in numpy, whose operations on a few numbers cost a fraction of torch's.
    """
    delta = reward + discount * next_value * (~terminated) - value
    carry = discount * gae_lambda * (~(terminated | truncated)).to(delta.dtype)
    by_step = delta.detach().transpose(0, 1).cpu().contiguous()  # in place: delta_s becomes advantage_s
    advantages, carries = by_step.numpy(), carry.transpose(0, 1).cpu().contiguous().numpy()
    later = np.zeros_like(advantages[0])
    for advantage, carried in zip(advantages[::-1], carries[::-1], strict=True):
        advantage += carried * later
        later = advantage
    return by_step.transpose(0, 1).to(delta.device).contiguous()


def td_target(reward: Tensor, next_value: Tensor, terminated: Tensor, discount: float) -> Tensor:
    """One-step target ``reward + discount * (1 - terminated) * next_value``; any equal shapes.

    ``terminated`` is 0 or 1 (float); truncation does not enter, because ``next_value`` is that of the true
    successor.
    """
    return reward + discount * (1.0 - terminated) * next_value


def normalize_per_task(advantage: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Zero mean and unit variance within each task; ``[T, ...]`` in and out."""
    flat = advantage.flatten(1)
    normalized = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + epsilon)
    return normalized.view_as(advantage)


def normalize_over_tasks(advantage: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Zero mean and unit variance over all tasks together; ``[T, ...]`` in and out."""
    return (advantage - advantage.mean()) / (advantage.std() + epsilon)


def tanh_log_det(raw: Tensor) -> Tensor:
    """``log(1 - tanh(raw)^2)`` element by element, stable for large ``|raw|``.

    Uses the identity ``2 (log 2 - raw - softplus(-2 raw))``.
    """
    return 2.0 * (math.log(2.0) - raw - F.softplus(-2.0 * raw))


def tanh_normal_log_prob(raw: Tensor, mean: Tensor, log_std: Tensor, mask: Tensor) -> Tensor:
    """Log density of the action ``tanh(raw)`` when ``raw ~ N(mean, exp(log_std)^2)``.

    Haarnoja et al. 2018, appendix C. ``raw, mean, log_std: [..., A]``, ``mask`` broadcasts; returns ``[...]``.
    """
    per_dimension = normal_log_prob(raw, mean, log_std) - tanh_log_det(raw)
    return (per_dimension * mask).sum(-1)


class _ClampInward(torch.autograd.Function):
    """See :func:`clamp_inward`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        outward = ((x > ctx.high) & (grad < 0)) | ((x < ctx.low) & (grad > 0))
        return grad.masked_fill(outward, 0.0), None, None


def clamp_inward(x: Tensor, low: float, high: float) -> Tensor:
    """Return ``x`` clamped to ``[low, high]``, with a gradient outside where a descent step leads back.

    That of ``clamp`` is 0 outside: what has once passed a bound would stay there whatever the loss says.
    """
    if x.requires_grad and torch.is_grad_enabled():
        clamped: Tensor = _ClampInward.apply(x, low, high)  # type: ignore[no-untyped-call]
        return clamped
    return x.clamp(low, high)


def masked_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Normalised log-probabilities ``[..., A]`` with choices outside ``mask`` at a very low, finite value."""
    return torch.log_softmax(logits.masked_fill(~mask, -1e8), dim=-1)


def categorical_log_prob(log_probs: Tensor, action: Tensor) -> Tensor:
    """Log-probability of ``action [...]`` (integers) under normalised ``log_probs [..., A]``."""
    return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def categorical_entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of normalised ``log_probs [..., A]``; returns ``[...]``."""
    return -(log_probs.exp() * log_probs).sum(-1)


class PolicyLoss(NamedTuple):
    """Clipped policy loss and its diagnostics, each ``[T]``."""

    loss: Tensor
    approximate_kl: Tensor
    clip_fraction: Tensor


def ppo_policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float) -> PolicyLoss:
    """Clipped surrogate of PPO (Schulman et al. 2017, equation 7), negated, per task.

    All inputs ``[T, B]``. ``approximate_kl`` is the estimator ``E[(ratio - 1) - log ratio]``, which is never
    negative.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean(-1)
    with torch.no_grad():
        approximate_kl = (ratio - 1.0 - log_ratio).mean(-1)
        clip_fraction = ((ratio - 1.0).abs() > clip).to(loss.dtype).mean(-1)
    return PolicyLoss(loss, approximate_kl, clip_fraction)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared error per task; ``[T, B]`` in, ``[T]`` out."""
    return 0.5 * (prediction - target).square().mean(-1)


def clipped_squared_error(prediction: Tensor, target: Tensor, old: Tensor, clip: float) -> Tensor:
    """Half the mean of the larger squared error of a value and of that value held near ``old``, per task.

    ``0.5 E[max((v - y)^2, (old + clamp(v - old, -clip, clip) - y)^2)]``, as OpenAI Baselines' PPO has it (Engstrom
    et al. 2020, section 3). All ``[T, B]`` in, ``[T]`` out.
    """
    held = old + (prediction - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((prediction - target).square(), (held - target).square()).mean(-1)


def finite_mean(values: Tensor) -> Tensor:
    """Mean over the tasks whose value is finite; ``[T]`` in, a scalar out. Plain ``mean()`` where all are."""
    mean = values.mean()
    finite = torch.isfinite(values)
    others = torch.where(finite, values, 0.0).sum() / finite.sum().clamp_min(1)
    return torch.where(torch.isfinite(mean), mean, others)


def two_hot(x: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Each number as weights on the two atoms around it, so that their mean is the number.

    With atoms ``z_k = low + k d``, ``d = (high - low) / (bins - 1)``, and ``z_k <= x <= z_{k+1}``, the weights are
    ``(z_{k+1} - x) / d`` and ``(x - z_k) / d``; numbers outside ``[low, high]`` count as the nearest end
    (Bellemare et al. 2017, equation 7; Schrittwieser et al. 2020, appendix F). Weights of what is not finite are
    NaN. ``[...]`` to ``[..., bins]``.
    """
    position = (x.nan_to_num().clamp(low, high) - low) * ((bins - 1) / (high - low))
    below = position.floor().clamp(0, bins - 2)
    weight = (position - below + (x - x)).unsqueeze(-1)  # x - x: 0, or NaN where x is not finite
    index = below.long().unsqueeze(-1)
    weights = x.new_zeros(*x.shape, bins)
    return weights.scatter_(-1, index, 1.0 - weight).scatter_(-1, index + 1, weight)


def categorical_value(logits: Tensor, atoms: Tensor) -> Tensor:
    """Mean of the distribution, ``sum_k softmax(logits)_k z_k``; ``[..., bins]`` to ``[...]``."""
    return (logits.softmax(-1) * atoms).sum(-1)


def categorical_cross_entropy(logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
    """Mean cross-entropy of the two-hot targets and the distributions, per task.

    ``-sum_k two_hot(target)_k log softmax(logits)_k``; ``logits [T, B, bins]`` and ``target [T, B]`` to ``[T]``.
    """
    weights = two_hot(target, low, high, logits.shape[-1])
    return -(weights * F.log_softmax(logits, dim=-1)).sum(-1).mean(-1)


def support(low: float, high: float, bins: int) -> Tensor:
    """Return the atoms, ``[bins]``."""
    return torch.linspace(low, high, bins, dtype=torch.float64).float()
