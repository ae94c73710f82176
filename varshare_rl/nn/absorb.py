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
Schönemann 1966). So component ``k`` stays what it was as far as possible, and its sigmas are kept:
under rotations of the components equal sigmas are the same posterior, and the sigmas' part of the KL divergence
does not move, so the nats fall by exactly what the means save.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varshare_rl.nn.layer import AbsorptionMove, TaskLayer, task_layers

#: Least relative saving that is worth a move.
_WORTH = 1e-6


@dataclass(frozen=True)
class Absorption:
    """Outcome of absorbing in a layer, also where nothing was changed.

    Attributes:
        error: change of each task's mean weight, ``[T]``, relative to the larger residual of before and after.
        share: size of the move relative to ``theta``, ``|rate M| / |theta|`` (Frobenius norms).
        saving: what the means cost less afterwards, relative to what they cost; in nats of the balanced factors.
        done: the layer was changed.
        rescaled: parameters of a changed layer that an optimiser's moments no longer fit.
    """

    error: Tensor
    share: float
    saving: float
    done: bool
    rescaled: tuple[str, ...] = ()


@torch.no_grad()
def absorb(
    module: nn.Module, rate: float, max_error: float, target_module: nn.Module | None = None
) -> dict[str, Absorption]:
    """Absorb in every layer of ``module`` that has residuals; returns what happened, by layer name.

    A layer is left as it is, to the bit, when a task's error would pass ``max_error``, when the means would not
    cost fewer nats afterwards (``theta`` has no prior, so this is what the ELBO gains; residuals that conflict
    more than they agree need more rank without their mean), or when its ``theta`` is frozen (a base that others
    rely on).

    Args:
        module: a network, or whatever holds layers with residuals.
        rate: share of the mean to move, above 0 and at most 1.
        max_error: largest error of any task at which a layer is still changed.
        target_module: a slow copy of ``module`` (a target network). Where a layer changes, its layer of the
            same name absorbs its own mean, so that averaging factors goes on between factors that correspond.

    Raises:
        ValueError: ``rate`` is outside (0, 1], or ``max_error`` is negative.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}; it must be above 0 and at most 1")
    if not max_error >= 0:
        raise ValueError(f"max_error is {max_error}; it must be at least 0")
    copies = {} if target_module is None else dict(task_layers(target_module))
    done = {}
    for name, layer in task_layers(module):
        theta = getattr(layer, "theta", None)
        move = None if theta is None or not theta.requires_grad else layer.absorption(rate)
        if move is None:
            continue
        cost = float(move.cost_before.sum())
        saving = 1.0 - float(move.cost_after.sum()) / cost if cost > 0 else 0.0
        share = float(move.step.norm() / layer.theta.double().norm().clamp_min(1e-12))
        worth = saving > _WORTH and float(move.error.max()) <= max_error
        if worth:
            _apply(layer, move)
            theirs = copies[name].absorption(rate) if name in copies else None
            if theirs is not None:
                _apply(copies[name], theirs)
        done[name] = Absorption(move.error, share, saving, worth, move.rescaled if worth else ())
    return done


def _apply(layer: TaskLayer, move: AbsorptionMove) -> None:
    layer.theta.add_(move.step.to(layer.theta.dtype))
    for name, mean in move.means.items():
        layer.get_parameter(name).copy_(mean)
