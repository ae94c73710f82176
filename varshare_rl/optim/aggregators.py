"""Ways to combine the tasks' gradients of the shared parameters, through TorchJD, and their options."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from varshare_rl.errors import UserError
from varshare_rl.optim.gradnorm import GradNorm, GradNormConfig
from varshare_rl.optim.jacobian import GradientAggregator
from varshare_rl.types import Tree


class AggregatorName(Enum):
    """Ways from losses per task to one gradient; the comments give the papers."""

    mean = "mean"  # of the losses
    pcgrad = "pcgrad"  # Yu et al. 2020, Gradient Surgery for Multi-Task Learning
    cagrad = "cagrad"  # Liu et al. 2021, Conflict-Averse Gradient Descent for Multi-task Learning
    fairgrad = "fairgrad"  # Ban and Ji 2024, Fair Resource Allocation in Multi-Task Learning
    nashmtl = "nashmtl"  # Navon et al. 2022, Multi-Task Learning as a Bargaining Game
    upgrad = "upgrad"  # Quinton and Rey 2024, Jacobian Descent for Multi-Objective Optimization
    mgda = "mgda"  # Desideri 2012; Sener and Koltun 2018, Multi-Task Learning as Multi-Objective Optimization
    imtlg = "imtlg"  # Liu et al. 2021, Towards Impartial Multi-task Learning
    aligned_mtl = "aligned_mtl"  # Senushkin et al. 2023, Independent Component Alignment
    gradvac = "gradvac"  # Wang et al. 2021, Gradient Vaccine
    graddrop = "graddrop"  # Chen et al. 2020, Just Pick a Sign
    gradnorm = "gradnorm"  # Chen et al. 2018, GradNorm
    softmax_temperature = "softmax_temperature"  # Yang et al. 2020, Multi-Task RL with Soft Modularization


class AggregateScale(Enum):
    """Lengths of an aggregated gradient."""

    mean = "mean"  # that of the mean of the tasks' gradients
    paper = "paper"  # that of the aggregator's paper


class AlignedScale(Enum):
    """The eigenvalue of the Gramian that AlignedMTL gives to all of its components."""

    min = "min"
    median = "median"
    rmse = "rmse"


@dataclass
class CAGradConfig:
    """Options of ``cagrad``."""

    c: float = 0.4  # radius of the ball around the mean gradient, as a share of its norm


@dataclass
class FairGradConfig:
    """Options of ``fairgrad``."""

    alpha: float = 1.0  # fairness: 1 proportional, large max-min


@dataclass
class NashMTLConfig:
    """Options of ``nashmtl``."""

    max_norm: float = 1.0  # of the combined gradient; 0: none
    solve_every: int = 1  # steps
    iterations: int = 20


@dataclass
class AlignedMTLConfig:
    """Options of ``aligned_mtl``."""

    scale: AlignedScale = AlignedScale.min


@dataclass
class GradVacConfig:
    """Options of ``gradvac``."""

    decay: float = 0.01  # how quickly the targets of the cosine similarities follow them


@dataclass
class GradientConfig:
    """Options of ``gradient``: the methods of actor and critic, and their settings."""

    actor: AggregatorName = AggregatorName.mean
    critic: AggregatorName = AggregatorName.mean
    scale: AggregateScale = AggregateScale.mean
    cagrad: CAGradConfig = field(default_factory=CAGradConfig)
    fairgrad: FairGradConfig = field(default_factory=FairGradConfig)
    nashmtl: NashMTLConfig = field(default_factory=NashMTLConfig)
    aligned_mtl: AlignedMTLConfig = field(default_factory=AlignedMTLConfig)
    gradvac: GradVacConfig = field(default_factory=GradVacConfig)
    gradnorm: GradNormConfig = field(default_factory=GradNormConfig)


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


def build_aggregator(method: AggregatorName, config: GradientConfig, num_tasks: int) -> GradientAggregator:
    """Return the aggregator of a method that needs the gradients per task.

    Raises:
        UserError: TorchJD or what a method of it needs is not installed.
    """
    if method is AggregatorName.gradnorm:
        return GradNorm(config.gradnorm, num_tasks)
    try:
        from torchjd import aggregation

        return _from_torchjd(aggregation, method, config, num_tasks)
    except ImportError as error:
        raise UserError(
            f"gradient={method.value} needs TorchJD ({error.msg}); give another gradient, or install it with "
            "pip install 'varshare_rl[gradient]'"
        ) from error


def _from_torchjd(
    torchjd: Any, method: AggregatorName, config: GradientConfig, num_tasks: int
) -> GradientAggregator:
    if method is AggregatorName.graddrop:
        return GradDropAggregator(torchjd.GradDrop())
    if method is AggregatorName.pcgrad:
        return GramianAggregator(torchjd.PCGradWeighting(), of_sum=True)
    if method is AggregatorName.gradvac:
        return GradVacAggregator(torchjd.GradVacWeighting(beta=config.gradvac.decay))
    if method is AggregatorName.nashmtl:
        chosen = config.nashmtl
        aggregator = torchjd.NashMTL(num_tasks, chosen.max_norm, chosen.solve_every, chosen.iterations)
        return NashMTLAggregator(aggregator.weighting)
    if method is AggregatorName.fairgrad:
        alpha = config.fairgrad.alpha  # G w = w^(-1 / alpha)
        return GramianAggregator(torchjd.FairGradWeighting(alpha), degree=alpha / (1.0 + alpha))
    if method is AggregatorName.cagrad:
        return GramianAggregator(torchjd.CAGradWeighting(config.cagrad.c))
    if method is AggregatorName.aligned_mtl:
        return GramianAggregator(torchjd.AlignedMTLWeighting(scale_mode=config.aligned_mtl.scale.value))
    stateless = {
        AggregatorName.upgrad: torchjd.UPGradWeighting,
        AggregatorName.mgda: torchjd.MGDAWeighting,
        AggregatorName.imtlg: torchjd.IMTLGWeighting,
    }
    return GramianAggregator(stateless[method]())
