"""The options of ``gradient``: which registered aggregators make one gradient of the tasks' losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, make_dataclass
from enum import Enum
from functools import cache
from typing import Any

from varshare_rl.errors import UserError
from varshare_rl.optim.jacobian import GradientAggregator
from varshare_rl.registry import lookup, register, registered

MEAN = "mean"
TEMPERATURE = "softmax_temperature"


class AggregatorConfig(ABC):
    """Options of a gradient aggregator: what ``gradient=<name>`` chooses and ``gradient.<name>.<key>`` sets."""

    @abstractmethod
    def build(self, num_tasks: int) -> GradientAggregator | None:
        """The aggregator; None where weights of the losses say it all and no gradient per task is needed."""


@register("gradient", MEAN)
@dataclass
class MeanConfig(AggregatorConfig):
    """``gradient=mean``: the gradient of the mean of the losses."""

    def build(self, num_tasks: int) -> None:
        """Return None: :class:`~varshare_rl.optim.step.Aggregation` is the mean."""


@register("gradient", TEMPERATURE)
@dataclass
class SoftmaxTemperatureConfig(AggregatorConfig):
    """``gradient=softmax_temperature``: SAC's entropy coefficients weigh the losses (Yang et al. 2020)."""

    def build(self, num_tasks: int) -> None:
        """Return None: the algorithm has what :class:`~varshare_rl.optim.step.TemperatureAggregation` weighs by."""


class AggregateScale(Enum):
    """Lengths of an aggregated gradient."""

    mean = "mean"
    paper = "paper"


@dataclass
class GradientConfig:
    """Aggregation of losses per task to one gradient. :func:`gradient_schema` adds every aggregator's options."""

    actor: str = MEAN
    "Aggregator of the actor's gradients; `gradient=<name>` sets both."
    critic: str = MEAN
    "Aggregator of the critic's gradients."
    scale: AggregateScale = AggregateScale.mean
    "Length of an aggregated gradient: that of the mean of the tasks' gradients, or that of the aggregator's paper."

    def check(self, prefix: str) -> None:
        """Raise UserError for names that no aggregator has."""
        known = registered("gradient")
        for part in ("actor", "critic"):
            name = getattr(self, part)
            if name not in known:
                raise UserError(f"{prefix}{part} is {name}; choose one of {', '.join(known)}")

    def build(self, name: str, num_tasks: int) -> GradientAggregator | None:
        """The aggregator of a name with its options, see :meth:`AggregatorConfig.build`.

        Raises:
            UserError: there is none, or it needs a package that is not installed.
        """
        config: Any = getattr(self, name, None) or lookup("gradient", name)()
        aggregator: GradientAggregator | None = config.build(num_tasks)
        return aggregator


def gradient_schema() -> type[GradientConfig]:
    """:class:`GradientConfig` with the options of every registered aggregator that has any, under its name."""
    return _schema(tuple((name, config) for name, config in registered("gradient").items() if fields(config)))


@cache
def _schema(options: tuple[tuple[str, type[Any]], ...]) -> type[GradientConfig]:
    entries = [(name, config, field(default_factory=config)) for name, config in options]
    return make_dataclass("GradientConfig", entries, bases=(GradientConfig,))
