"""Aggregate the tasks' gradients of the shared parameters to one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varshare_rl.optim.jacobian import GradientAggregator
from varshare_rl.types import Tree


class GramianAggregator(GradientAggregator):
    """Weights for the gradients that depend on their inner products alone: ``g = sum_i w_i(G) g_i``.

    ``G = J J^T [T, T]`` has the inner products of the tasks' gradients of their own losses, in float64, and is
    brought to a mean diagonal of 1 before the weights are found, so that tolerances of solvers mean the same at
    any scale of the losses. Weights of degree ``d`` have ``w(s G) = s^-d w(G)``, which undoes that.

    Args:
        weighting: ``G`` to ``w [T]``, on the CPU.
        of_sum: the method replaces the sum of the gradients rather than their mean (PCGrad, GradVac): it is
            divided by ``T``, so that it equals the mean where nothing conflicts.
        degree: ``d``; None: the weighting needs ``G`` as it is. Weights of degree 0 that do not replace the sum are
            shares of a mean: of ``n`` tasks out of ``T`` they are multiplied by ``n / T``, so that leaving a task
            out takes its part away and leaves those of the others as they are.
    """

    #: The weighting remembers things per task and cannot be asked about some of them, so while a task is left out
    #: the others are averaged.
    remembers = False

    def __init__(
        self, weighting: Callable[[Tensor], Tensor], of_sum: bool = False, degree: float | None = 0.0
    ) -> None:
        self.weighting, self.of_sum, self.degree = weighting, of_sum, degree

    def __call__(self, rows: Tensor, losses: Tensor, kept: Tensor | None) -> Tensor:
        tasks = len(rows)
        gramian = (rows @ rows.t()).to("cpu", torch.float64) * tasks**2
        scale = gramian.diagonal().mean()
        if not 0.0 < float(scale) < float("inf") or (kept is not None and self.remembers):
            return rows.sum(0)
        index = torch.arange(tasks) if kept is None else kept.cpu().nonzero().squeeze(1)
        if self.degree is not None:
            gramian = gramian / scale
        found = self.weighting(gramian[index][:, index]).double()
        if self.degree:
            found = found * scale**-self.degree
        if not self.of_sum:  # the rows have 1 / T in them
            found = found * (len(index) if self.degree == 0.0 else tasks)
        weights = torch.zeros(tasks, dtype=torch.float64)
        weights[index] = found
        return weights.to(rows) @ rows


class GradDropAggregator(GradientAggregator):
    """Every entry keeps the gradients of one sign, drawn by how much of each there is (Chen et al. 2020).

    Not a function of inner products. It replaces the sum, so it is divided by ``T``, as in
    :class:`GramianAggregator`.
    """

    def __init__(self, aggregator: Callable[[Tensor], Tensor]) -> None:
        self.aggregator = aggregator

    def __call__(self, rows: Tensor, losses: Tensor, kept: Tensor | None) -> Tensor:
        return self.aggregator(rows)


class GradVacAggregator(GramianAggregator):
    """Gradient Vaccine, with the targets of the cosine similarities, which TorchJD keeps to itself."""

    remembers = True
    state_fields = ("targets",)

    def __init__(self, vaccine: Any) -> None:
        super().__init__(vaccine, of_sum=True)
        self.vaccine = vaccine

    @property
    def targets(self) -> Tensor | None:
        """Cosine similarities that gradients are brought to."""
        targets: Tensor | None = self.vaccine._phi_t
        return targets

    @targets.setter
    def targets(self, targets: Tensor | None) -> None:
        self.vaccine._phi_t = targets
        self.vaccine._state_key = None if targets is None else (len(targets), targets.dtype)

    def forget(self) -> None:
        self.vaccine.reset()


class NashMTLAggregator(GramianAggregator):
    """NashMTL's weights from the Gramian; they start from the last ones, which TorchJD remembers.

    TorchJD has them from the Jacobian, of which it uses the Gramian and the norm of the combination; both are the
    same for any ``S`` with ``S S^T = G``, so it is given the symmetric root.
    """

    remembers = True

    def __init__(self, bargaining: Any) -> None:
        super().__init__(self._weights, degree=None)
        self.bargaining = bargaining

    def _weights(self, gramian: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(gramian)
        root = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.t()
        with warnings.catch_warnings():  # of cvxpy, on the form of the problem and inaccurate solutions
            warnings.simplefilter("ignore")
            weights: Tensor = self.bargaining(root)
        return weights

    def forget(self) -> None:
        self.bargaining.reset()

    def state(self) -> Tree:
        return {name: getattr(self.bargaining, name) for name in ("step", "prvs_alpha", "normalization_factor")}

    def load_state(self, state: Tree) -> None:
        for name, value in state.items():
            setattr(self.bargaining, name, value)
        if self.bargaining.step > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.bargaining._init_optim_problem()
