"""Absorption: the part of the residuals that all tasks have in common moves into the shared weight.

With ``R_i`` the mean residual of task ``i`` and ``M`` its mean over tasks,

    theta <- theta + rate * M        R_i <- R_i - rate * M

leaves every mean weight ``W_i = theta + R_i`` as it is and makes the residuals smaller: a step of Reptile (Nichol,
Achiam and Schulman 2018, the meta-update towards the mean of the tasks' weights) that no task notices.

A full-rank residual takes this exactly. For a residual of rank ``r`` the move has two parts. A weight change that
all tasks have in common is in every ``R_i`` and so has a rank of at most ``r``; hence ``M`` is the best
approximation of rank ``r`` to the mean (Eckart and Young 1936). And ``R_i - rate * M``, of rank up to ``2 r``, is
brought back to rank ``r`` by its own best approximation; what that loses is the *error*, given relative to the
residual. Both come from QR factors of the stacked low-rank factors, so the only singular value decompositions are
one of size ``min(T r, G, F)`` and one of size ``2 r`` per task; no ``[G, F]`` residual is ever built.

Of all factors with the same product the new ones are balanced, ``B^T B = A A^T``, which costs the fewest nats under
one prior for both, and among the balanced ones those nearest to the old factors (an orthogonal Procrustes problem,
Schönemann 1966). So component ``k`` stays what it was as far as possible, and its spreads are kept:
under rotations of the components equal spreads are the same posterior, and the spreads' part of the KL divergence
does not move, so the nats fall by exactly what the means save.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varshare_rl.nn.initial import INITIAL_MU_STD
from varshare_rl.nn.posteriors import PosteriorLayer, posterior_layers
from varshare_rl.nn.varshare import VarShareLayer
from varshare_rl.nn.varshare_lora import VarShareLoRALayer

#: Singular values below this share of the residual are rounding.
_NOTHING = 1e-7
#: Least relative saving that is worth a move.
_WORTH = 1e-6


@dataclass(frozen=True)
class Absorption:
    """What absorbing did to a layer, or would have done.

    Attributes:
        error: change of each task's mean weight, ``[T]``, relative to the larger residual of before and after.
        share: size of the move relative to ``theta``, ``|rate M| / |theta|`` (Frobenius norms).
        saving: what the means cost less afterwards, relative to what they cost; in nats of the balanced factors.
        done: whether the layer was changed.
    """

    error: Tensor
    share: float
    saving: float
    done: bool


@dataclass(frozen=True)
class _Move:
    """The new means of a layer, by name, and what is added to theta."""

    step: Tensor
    means: dict[str, Tensor]
    error: Tensor
    cost_before: Tensor
    cost_after: Tensor


@torch.no_grad()
def absorb(
    module: nn.Module, rate: float, max_error: float, target_module: nn.Module | None = None
) -> dict[str, Absorption]:
    """Absorb in every layer of ``module`` that has residuals; returns what happened, by layer name.

    A layer is left as it is, to the bit, when a task's error would pass ``max_error``, when the means would not
    cost fewer nats afterwards (``theta`` has no prior, so this is whether the ELBO gains; residuals that conflict
    more than they agree need more rank without their mean), or when its ``theta`` is frozen (a base that others
    rely on).

    Args:
        module: a network, or whatever holds layers with residuals.
        rate: share of the mean to move, above 0 and at most 1.
        max_error: largest error of any task at which a layer is still changed.
        follower: a slow copy of ``module`` (a target network). Where a layer changes, the follower's layer of the
            same name absorbs its own mean, so that averaging factors goes on between factors that correspond.

    Raises:
        ValueError: ``rate`` is outside (0, 1], or ``max_error`` is negative.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}; it must be above 0 and at most 1")
    if not max_error >= 0:
        raise ValueError(f"max_error is {max_error}; it must be at least 0")
    copies = {} if target_module is None else dict(posterior_layers(target_module))
    done = {}
    for name, layer in posterior_layers(module):
        if not layer.theta.requires_grad:
            continue
        move = _move(layer, rate)
        cost = float(move.cost_before.sum())
        saving = 1.0 - float(move.cost_after.sum()) / cost if cost > 0 else 0.0
        share = float(move.step.norm() / layer.theta.double().norm().clamp_min(1e-12))
        worth = saving > _WORTH and float(move.error.max()) <= max_error
        if worth:
            _apply(layer, move)
            if name in copies:
                _apply(copies[name], _move(copies[name], rate))
        done[name] = Absorption(move.error, share, saving, worth)
    return done


def _apply(layer: PosteriorLayer, move: _Move) -> None:
    layer.theta.add_(move.step.to(layer.theta.dtype))
    for name, mean in move.means.items():
        layer.get_parameter(name).copy_(mean)


def _move(layer: PosteriorLayer, rate: float) -> _Move:
    """The move of a layer, in float64."""
    precision = layer.prior_scale.double().pow(-2)
    if isinstance(layer, VarShareLayer):
        return _full_rank_move(layer, rate, precision)
    return _low_rank_move(layer, rate, precision)


def _full_rank_move(layer: VarShareLayer, rate: float, precision: Tensor) -> _Move:
    mus = layer.mus.double()
    step = rate * mus.mean(0)
    after = mus - step
    before_cost, after_cost = (0.5 * precision * mean.flatten(1).square().sum(1) for mean in (mus, after))
    return _Move(step, {"mus": after}, torch.zeros_like(precision), before_cost, after_cost)


def _low_rank_move(layer: VarShareLoRALayer, rate: float, precision: Tensor) -> _Move:
    a, b, rank = layer.mus_A.double(), layer.mus_B.double(), layer.rank
    left, right = shared_part(a, b, rank)
    left = rate * left
    difference_a = torch.cat([a, right.expand(len(a), -1, -1)], 1)  # [T, r + q, F]
    difference_b = torch.cat([b, -left.expand(len(b), -1, -1)], 2)  # [T, G, r + q]
    u, values, vh = _decompose(difference_a, difference_b)
    nuclear_before = _decompose(a, b)[1]
    size = torch.maximum(nuclear_before.norm(dim=1), values.norm(dim=1))
    lost = values[:, rank:].norm(dim=1)
    tiny = torch.finfo(torch.float64).tiny
    new_a, new_b = _balanced(u, values, vh, rank, _NOTHING * size)
    new_a, new_b = _aligned(new_a, new_b, a, b)
    return _Move(
        layer.scale * (left @ right),
        {"mus_A": new_a, "mus_B": new_b},
        lost / size.clamp_min(tiny),
        precision * nuclear_before.sum(1),  # (|A|^2 + |B|^2) / (2 p^2) of balanced factors
        precision * values[:, :rank].sum(1),
    )


def shared_part(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of rank ``rank`` to ``mean_i b_i a_i``, as factors ``[G, q] [q, F]`` with ``q <= rank``.

    ``a: [T, r, F]``, ``b: [T, G, r]``. The mean is the product of the stacked factors ``[G, T r] [T r, F] / T``.
    """
    stacked_a = a.flatten(0, 1).unsqueeze(0)
    stacked_b = b.transpose(0, 1).flatten(1).unsqueeze(0) / len(b)
    u, values, vh = _decompose(stacked_a, stacked_b)
    return u[0, :, :rank] * values[0, :rank], vh[0, : min(rank, values.shape[1])]


def _decompose(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of ``b a``: ``u [T, G, k]``, ``values [T, k]``, ``vh [T, h, F]``, ``h >= k``.

    ``a: [T, n, F]``, ``b: [T, G, n]``; ``vh`` has further orthonormal rows where ``a`` has the room, so that there
    are directions for components without a singular value.
    """
    basis_b, core_b = torch.linalg.qr(b)
    basis_a, core_a = torch.linalg.qr(a.transpose(1, 2))
    u, values, vh = torch.linalg.svd(core_b @ core_a.transpose(1, 2), full_matrices=True)
    return basis_b @ u[:, :, : values.shape[1]], values, vh @ basis_a.transpose(1, 2)


def _balanced(u: Tensor, values: Tensor, vh: Tensor, rank: int, nothing: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``a [T, rank, F]`` and ``b [T, G, rank]`` of the leading singular triples, ``b^T b = a a^T``.

    Components whose value is not above ``nothing [T]`` start again as fresh ones do: ``b = 0`` and a short row of
    ``a``, in a direction that no other component has, so that gradients reach them.
    """
    kept = min(rank, values.shape[1])
    directions = min(rank, vh.shape[1])
    roots = values.new_zeros(len(values), rank)
    roots[:, :kept] = values[:, :kept].sqrt()
    empty = roots.square() <= nothing.unsqueeze(1)
    a = vh.new_zeros(len(vh), rank, vh.shape[2])
    b = u.new_zeros(len(u), u.shape[1], rank)
    b[:, :, :kept] = u[:, :, :kept]
    a[:, :directions] = vh[:, :directions]
    short = INITIAL_MU_STD * math.sqrt(vh.shape[2])
    return torch.where(empty, short, roots).unsqueeze(2) * a, roots.masked_fill(empty, 0.0).unsqueeze(1) * b


def _aligned(a: Tensor, b: Tensor, old_a: Tensor, old_b: Tensor) -> tuple[Tensor, Tensor]:
    """``o^T a`` and ``b o`` with the orthogonal ``o`` that brings them nearest to the old factors."""
    u, _, vh = torch.linalg.svd(b.transpose(1, 2) @ old_b + a @ old_a.transpose(1, 2))
    o = u @ vh
    return o.transpose(1, 2) @ a, b @ o
