"""The gradient aggregators that TorchJD computes. It is imported when one of them is built."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any

from varshare_rl.errors import missing_extra
from varshare_rl.fields import bounded
from varshare_rl.optim.aggregators import (
    GradDropAggregator,
    GradVacAggregator,
    GramianAggregator,
    NashMTLAggregator,
)
from varshare_rl.optim.gradient import AggregatorConfig
from varshare_rl.optim.jacobian import GradientAggregator
from varshare_rl.registry import register, registered


class TorchJDConfig(AggregatorConfig):
    """Options of an aggregator that needs TorchJD."""

    def build(self, num_tasks: int) -> GradientAggregator:
        """Make the aggregator. Raises UserError where TorchJD, or what a method of it needs, is not installed."""
        try:
            from torchjd import aggregation

            return self.make(aggregation, num_tasks)
        except ImportError as error:
            name = next(name for name, config in registered("gradient").items() if config is type(self))
            raise missing_extra(f"gradient={name} needs TorchJD ({error.msg})", "gradient") from error

    @abstractmethod
    def make(self, torchjd: Any, num_tasks: int) -> GradientAggregator:
        """Make the aggregator from ``torchjd.aggregation``."""


@register("gradient", "cagrad")
@dataclass
class CAGradConfig(TorchJDConfig):
    """``gradient=cagrad``: conflict-averse, near the mean (Liu et al. 2021)."""

    c: float = bounded(0.4, least=0)
    "Radius of the ball around the mean gradient, as a share of its norm."

    def make(self, torchjd: Any, num_tasks: int) -> GradientAggregator:
        """Make the aggregator."""
        return GramianAggregator(torchjd.CAGradWeighting(self.c))


@register("gradient", "nashmtl")
@dataclass
class NashMTLConfig(TorchJDConfig):
    """``gradient=nashmtl``: a bargaining game (Navon et al. 2022)."""

    max_norm: float = bounded(1.0, least=0)
    "Bound on the norm of the combined gradient; 0: none."
    solve_every: int = bounded(1, least=1)
    "Steps between solutions."
    iterations: int = bounded(20, least=1)
    "Iterations of the solver."

    def make(self, torchjd: Any, num_tasks: int) -> GradientAggregator:
        """Make the aggregator."""
        aggregator = torchjd.NashMTL(num_tasks, self.max_norm, self.solve_every, self.iterations)
        return NashMTLAggregator(aggregator.weighting)


@register("gradient", "upgrad")
@dataclass
class UPGradConfig(TorchJDConfig):
    """``gradient=upgrad``: the mean of projections that harm no task (Quinton and Rey 2024)."""

    def make(self, torchjd: Any, num_tasks: int) -> GradientAggregator:
        """Make the aggregator."""
        return GramianAggregator(torchjd.UPGradWeighting())


@register("gradient", "mgda")
@dataclass
class MGDAConfig(TorchJDConfig):
    """``gradient=mgda``: the shortest combination (Desideri 2012; Sener and Koltun 2018)."""

    def make(self, torchjd: Any, num_tasks: int) -> GradientAggregator:
        """Make the aggregator."""
        return GramianAggregator(torchjd.MGDAWeighting())


@register("gradient", "imtlg")
@dataclass
class IMTLGConfig(TorchJDConfig):
    """``gradient=imtlg``: equal projections on all tasks' gradients (Liu et al. 2021, Impartial)."""

    def make(self, torchjd: Any, num_tasks: int) -> GradientAggregator:
        """Make the aggregator."""
        return GramianAggregator(torchjd.IMTLGWeighting())


class AlignedScale(Enum):
    """Choice of the Gramian's eigenvalue that AlignedMTL gives to all of its components."""

    min = "min"
    median = "median"
    rmse = "rmse"


@register("gradient", "aligned_mtl")
@dataclass
class AlignedMTLConfig(TorchJDConfig):
    """``gradient=aligned_mtl``: independent component alignment (Senushkin et al. 2023)."""

    scale: AlignedScale = AlignedScale.min
    "The eigenvalue that all components get."

    def make(self, torchjd: Any, num_tasks: int) -> GradientAggregator:
        """Make the aggregator."""
        return GramianAggregator(torchjd.AlignedMTLWeighting(scale_mode=self.scale.value))


@register("gradient", "gradvac")
@dataclass
class GradVacConfig(TorchJDConfig):
    """``gradient=gradvac``: gradient vaccine (Wang et al. 2021)."""

    decay: float = bounded(0.01, least=0, most=1)
    "Rate at which the targets of the cosine similarities follow them."

    def make(self, torchjd: Any, num_tasks: int) -> GradientAggregator:
        """Make the aggregator."""
        return GradVacAggregator(torchjd.GradVacWeighting(beta=self.decay))


@register("gradient", "graddrop")
@dataclass
class GradDropConfig(TorchJDConfig):
    """``gradient=graddrop``: every entry keeps one sign (Chen et al. 2020, Just Pick a Sign)."""

    def make(self, torchjd: Any, num_tasks: int) -> GradientAggregator:
        """Make the aggregator."""
        return GradDropAggregator(torchjd.GradDrop())
