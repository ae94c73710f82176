"""Critics: a state value and twin action values, their units and losses.

Under PopArt value targets are brought to zero mean and unit standard deviation per task, and values stay what they
were.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from varshare_rl.fields import bounded, check_below
from varshare_rl.nn.config import Blocks, Initialization, NetworkConfig
from varshare_rl.nn.layer import plain_linear
from varshare_rl.nn.task_rows import TaskIds, in_order
from varshare_rl.ops.rl import (
    categorical_cross_entropy,
    categorical_value,
    clipped_squared_error,
    squared_error,
    support,
)

#: Bounds on the standard deviation that values are measured in.
LEAST_STD, LARGEST_STD = 1e-4, 1e6


class ValueLoss(Enum):
    """Loss of a critic: the squared error of a number, or the cross-entropy of a distribution."""

    squared = "squared"
    categorical = "categorical"


@dataclass
class CriticConfig:
    """Options of ``critic``: its networks where they differ from the policy's, its loss, and its units."""

    hidden: list[int] | None = bounded(None, least=1)
    "Sizes of the critics' hidden layers; null: as `network.hidden`."
    activation: str | None = None
    "Activation of the critics; null: as `network.activation`."
    layer_norm: bool | None = None
    "LayerNorm in the critics; null: as `network.layer_norm`."
    blocks: Blocks | None = None
    "Blocks of the critics' hidden layers; null: as `network.blocks`."
    initialization: Initialization | None = None
    "Initial weights of the critics; null: as `network.initialization`."
    output_gain: float | None = bounded(None, least=0)
    "Factor on the critics' initial last layer; null: as `network.output_gain`."
    loss: ValueLoss = ValueLoss.squared
    "Loss of the critics: the squared error of a value, or the cross-entropy of a distribution of values."
    bins: int = bounded(101, least=2)
    "Atoms of the categorical loss, from `value_min` to `value_max`."
    value_min: float = -10.0
    "Least atom, in units of the return; with PopArt in standard deviations of the task's targets."
    value_max: float = 10.0
    "Largest atom, in the same units."
    popart: bool = False
    "PopArt: values in each task's own units."
    popart_rate: float = bounded(0.01, above=0, most=1)
    "Weight of a gradient step's targets in their running mean and standard deviation."

    def check(self, prefix: str) -> None:
        """Raise UserError for atoms in no order."""
        check_below(self, prefix, "value_min", "value_max")

    @property
    def outputs(self) -> int:
        """Width of a critic network's output."""
        return self.bins if self.loss is ValueLoss.categorical else 1

    def architecture(self, network: NetworkConfig) -> NetworkConfig:
        """The architecture of the critic's networks: ``network`` with what is given here."""
        names = ("hidden", "activation", "layer_norm", "blocks", "initialization", "output_gain")
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        changed: NetworkConfig = replace(network, **own)
        return changed


class Held(NamedTuple):
    """What a critic's values are held near, see :func:`~varshare_rl.ops.rl.clipped_squared_error`."""

    old: Tensor  # [T, B]
    clip: float  # in the units of the loss


class Move(NamedTuple):
    """Statistics have moved: what was ``y`` in old units is ``ratio * y + shift`` in new ones, each ``[T]``."""

    ratio: Tensor
    shift: Tensor


class TargetStatistics(nn.Module):
    """Mean and standard deviation of the value targets of every task, forgetting at a rate.

    ``m <- m + rate (E[y] - m)`` and ``v <- v + rate (E[y^2] - v)``, both divided by ``1 - (1 - rate)^n`` after
    ``n`` batches, so that the first ones are not drawn towards their start at 0 (the correction of Kingma and Ba
    2015); ``mean = m``, ``std = sqrt(v - m^2)``, held between 1e-4 and 1e6 (van Hasselt et al. 2016; per task:
    Hessel et al. 2019). Before there is a batch the mean is 0 and the standard deviation 1. A task's batch with
    a target that is not finite does not count for that task. Statistics are float64.

    Args:
        num_tasks: ``T``.
        rate: weight of a new batch, in (0, 1].
    """

    per_task_buffers = ("first", "second", "weight", "mean", "std")
    first: Tensor
    second: Tensor
    weight: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, num_tasks: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        for name in ("first", "second", "weight", "mean"):
            self.register_buffer(name, torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("std", torch.ones(num_tasks, dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_read_former_name)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self, target: Tensor) -> Move:
        """Take in targets ``[T, B]``. A task's first batch sets its statistics, which moves nothing."""
        target = target.double()
        counts, set_before = torch.isfinite(target).all(1), self.weight > 0
        moments = (target.mean(1), target.square().mean(1), torch.ones_like(self.weight))
        for average, newest in zip((self.first, self.second, self.weight), moments, strict=True):
            average.copy_(torch.where(counts, average.lerp(newest, self.rate), average))
        mean = torch.where(counts, self.first / self.weight, self.mean)
        variance = (self.second / self.weight - mean.square()).clamp_min(0.0)
        std = torch.where(counts, variance.sqrt().clamp(LEAST_STD, LARGEST_STD), self.std)
        ratio = torch.where(set_before, self.std / std, 1.0)
        shift = torch.where(set_before, (self.mean - mean) / std, 0.0)
        self.mean.copy_(mean)
        self.std.copy_(std)
        return Move(ratio, shift)

    def normalize(self, value: Tensor, task_ids: TaskIds) -> Tensor:
        """``(value - mean) / std``, ``[T, B]``."""
        mean, std = (rows(statistic, task_ids, value).to(value.dtype) for statistic in (self.mean, self.std))
        return (value - mean) / std

    def restore(self, normalized: Tensor, task_ids: TaskIds) -> Tensor:
        """``std * normalized + mean``, ``[T, B]``."""
        statistics = (self.mean, self.std)
        mean, std = (rows(values, task_ids, normalized).to(normalized.dtype) for values in statistics)
        return torch.addcmul(mean, std, normalized)


class TaskAffine(nn.Module):
    """``a_i x + c_i`` with a scale and an offset of its own for every task; the identity at the start.

    Heads of task networks have weights that tasks share, so no head can take up one task's move of statistics.
    This map can.
    """

    per_task_parameters = ("scale", "offset")

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_tasks))
        self.offset = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, x: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B]`` in and out."""
        return torch.addcmul(rows(self.offset, task_ids, x), rows(self.scale, task_ids, x), x)

    @torch.no_grad()
    def follow(self, move: Move) -> None:
        """``a <- ratio a`` and ``c <- ratio c + shift``: unnormalised outputs stay what they were."""
        self.scale.copy_(move.ratio * self.scale)
        self.offset.copy_(move.ratio * self.offset + move.shift)


def rows(stacked: Tensor, task_ids: TaskIds, like: Tensor) -> Tensor:
    """Entries of ``stacked [T]`` for the tasks of ``like``, in a shape that broadcasts with it.

    ``like`` is ``[K, B]`` with ids ``[K]``, flat ``[N]`` with ids ``[N]``, or of any shape with one id.
    """
    ids = torch.as_tensor(task_ids)
    everything = ids.dim() == 1 and in_order(ids, len(stacked))
    chosen = stacked if everything else stacked[ids.to(stacked.device)]
    return chosen.unsqueeze(1) if ids.dim() == 1 and like.dim() == 2 else chosen


def _read_former_name(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Take the standard deviation of checkpoints that call it ``spread``."""
    if f"{prefix}spread" in state:
        state[f"{prefix}std"] = state.pop(f"{prefix}spread")


class CriticHead(nn.Module):
    """Reads one critic network's outputs ``[T, B, G]`` as values ``[T, B]`` in normalised units.

    Args:
        num_tasks: ``T``.
        config: with the squared loss the output is the value, under PopArt after a scale and an offset per task;
            with the categorical one outputs are logits over the atoms and the value is their mean.
    """

    atoms: Tensor

    def __init__(self, num_tasks: int, config: CriticConfig) -> None:
        super().__init__()
        self.categorical = config.loss is ValueLoss.categorical
        self.low, self.high = config.value_min, config.value_max
        if self.categorical:
            self.register_buffer("atoms", support(self.low, self.high, config.bins), persistent=False)
        # Atoms are fixed: a distribution over them cannot be moved and scaled without giving up the support.
        self.affine = TaskAffine(num_tasks) if config.popart and not self.categorical else None

    def value(self, outputs: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, G]`` to ``[T, B]``."""
        if self.categorical:
            return categorical_value(outputs, self.atoms)
        value = outputs.squeeze(-1)
        return value if self.affine is None else self.affine(value, task_ids)

    def loss(self, outputs: Tensor, target: Tensor, task_ids: TaskIds, held: Held | None = None) -> Tensor:
        """Loss against normalised targets ``[T, B]``, ``[T]``; a squared one may be ``held`` near such values."""
        if self.categorical:
            return categorical_cross_entropy(outputs, target, self.low, self.high)
        value = self.value(outputs, task_ids)
        return squared_error(value, target) if held is None else clipped_squared_error(value, target, *held)


class Critic(nn.Module):
    """Common part of a value network and twin critics: heads, units, losses.

    With PopArt, ``value = std_i * (a_i h + c_i) + mean_i`` where ``h`` is a network's output, ``mean_i`` and
    ``std_i`` are running statistics of task ``i``'s targets, and losses are in units of ``std_i`` (van
    Hasselt et al. 2016; Hessel et al. 2019). Without, mean and standard deviation are 0 and 1.

    Args:
        num_tasks: ``T``.
        networks: their number.
        config: see :class:`CriticConfig`.
    """

    def __init__(self, num_tasks: int, networks: int, config: CriticConfig) -> None:
        super().__init__()
        self.heads = nn.ModuleList(CriticHead(num_tasks, config) for _ in range(networks))
        self.statistics = TargetStatistics(num_tasks, config.popart_rate) if config.popart else None

    def track(self, target: Tensor, *target_critics: Critic) -> None:
        """Take targets ``[T, B]`` of all tasks into the statistics and keep every value as it was.

        ``target_critics`` are critics that share these statistics, such as target critics. Categorical heads cannot
        keep their values: these move with the statistics, at the statistics' rate.
        """
        if self.statistics is None:
            return
        move = self.statistics.update(target)
        for critic in (self, *target_critics):
            for head in critic.heads:
                if head.affine is not None:
                    head.affine.follow(move)  # type: ignore[union-attr, operator]

    def nat(self, losses: Tensor) -> Tensor | float:
        """Return what a nat of the likelihood is in ``losses [T]``.

        Gaussian targets have ``-log p = (y - v)^2 / (2 s^2)`` up to a constant, and the likeliest ``s^2`` is the
        mean squared error. The loss is half of that, so a nat is ``s^2``, twice it; a cross-entropy is in nats.
        """
        if self.heads[0].categorical:
            return 1.0
        return losses.detach() * (2.0 / len(self.heads))

    def value_std(self) -> Tensor:
        """The unit of every task's values, ``[T, 1]``; without PopArt 1 for all, ``[1, 1]``."""
        if self.statistics is None:
            return torch.ones(1, 1, device=next(self.parameters()).device)
        return self.statistics.std.float().unsqueeze(1)

    def target(self) -> Self:
        """A copy that is not trained and uses posterior means; it shares the statistics."""
        copy = deepcopy(self).requires_grad_(False).eval()
        copy.statistics = self.statistics
        return copy

    def renew(self, fresh: Critic) -> None:
        """Take over the parameters of ``fresh``; the statistics of the targets stay."""
        state = {name: value for name, value in fresh.state_dict().items() if not name.startswith("statistics.")}
        self.load_state_dict(state, strict=False)

    def read(self, head: int, outputs: Tensor, task_ids: TaskIds) -> Tensor:
        """Read outputs ``[T, B, G]`` of a network as values ``[T, B]`` in the units of the return."""
        value: Tensor = self.heads[head].value(outputs, task_ids)  # type: ignore[operator]
        return value if self.statistics is None else self.statistics.restore(value, task_ids)

    def units(self, head: int, task: int, factor: float = 1.0) -> list[nn.Module]:
        """Make modules that read a network's outputs ``[B, G]`` as values ``[B, 1]`` of one task.

        ``factor`` is what rewards were multiplied by: values are in units of rewards before that. Empty where the
        outputs are such values.
        """
        module: CriticHead = self.heads[head]  # type: ignore[assignment]
        scale, offset = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        if module.affine is not None:
            scale, offset = module.affine.scale[task].double(), module.affine.offset[task].double()
        if self.statistics is not None:
            std, mean = self.statistics.std[task], self.statistics.mean[task]
            scale, offset = std * scale, std * offset + mean
        if not module.categorical and scale == factor and offset == 0.0:
            return []
        weights = module.atoms.double() if module.categorical else torch.ones(1, dtype=torch.float64)
        weight, bias = (scale / factor * weights).unsqueeze(0), (offset / factor).reshape(1)
        last = plain_linear(weight.float(), bias.float())
        return [nn.Softmax(-1), last] if module.categorical else [last]

    def _loss(
        self, head: int, outputs: Tensor, target: Tensor, task_ids: TaskIds, held: Held | None = None
    ) -> Tensor:
        if self.statistics is not None:
            target = self.statistics.normalize(target, task_ids)
            if held is not None:
                held = held._replace(old=self.statistics.normalize(held.old, task_ids))
        loss: Tensor = self.heads[head].loss(outputs, target, task_ids, held)  # type: ignore[operator]
        return loss


class ValueNetwork(Critic):
    """State value ``V(obs)``.

    Args:
        network: task network with ``config.outputs`` outputs.
        num_tasks: ``T``.
        config: see :class:`CriticConfig`.
    """

    def __init__(self, network: nn.Module, num_tasks: int, config: CriticConfig) -> None:
        super().__init__(num_tasks, 1, config)
        self.network = network

    def forward(self, obs: Tensor, task_ids: TaskIds) -> Tensor:
        """``[T, B, F]`` to values ``[T, B]`` in the units of the return."""
        return self.read(0, self.network(obs, task_ids), task_ids)

    def loss(self, obs: Tensor, task_ids: TaskIds, target: Tensor, held: Held | None = None) -> Tensor:
        """Loss against targets ``[T, B]`` in the units of the return, ``[T]``; ``held`` near such values or not."""
        return self._loss(0, self.network(obs, task_ids), target, task_ids, held)


class TwinQ(Critic):
    """Two action values ``Q(obs, action)`` (Fujimoto et al. 2018).

    Args:
        make: builds one task network with ``config.outputs`` outputs.
        num_tasks: ``T``.
        config: see :class:`CriticConfig`.
    """

    def __init__(self, make: Callable[[], nn.Module], num_tasks: int, config: CriticConfig) -> None:
        super().__init__(num_tasks, 2, config)
        self.networks = nn.ModuleList([make(), make()])

    def forward(self, obs: Tensor, action: Tensor, task_ids: TaskIds) -> Tensor:
        """``obs [T, B, F]`` and ``action [T, B, A]`` to both values, ``[2, T, B]``."""
        return self._values(self._outputs(obs, action, task_ids), task_ids)

    def loss(self, obs: Tensor, action: Tensor, task_ids: TaskIds, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of both losses against targets ``[T, B]``, ``[T]``; and both values, ``[2, T, B]``, detached."""
        outputs = self._outputs(obs, action, task_ids)
        first, second = (self._loss(head, y, target, task_ids) for head, y in enumerate(outputs))
        losses = first + second
        with torch.no_grad():
            return losses, self._values(outputs, task_ids)

    def _outputs(self, obs: Tensor, action: Tensor, task_ids: TaskIds) -> list[Tensor]:
        x = torch.cat([obs, action], dim=-1)
        return [network(x, task_ids) for network in self.networks]

    def _values(self, outputs: list[Tensor], task_ids: TaskIds) -> Tensor:
        return torch.stack([self.read(head, y, task_ids) for head, y in enumerate(outputs)])
