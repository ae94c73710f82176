"""From losses per task to a step: aggregate them to one gradient, clip its norm, step the optimisers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from varshare_rl.nn.stochastic import drawn_layers
from varshare_rl.optim.divergence_guard import DivergenceGuard, DivergenceGuardConfig, contained
from varshare_rl.optim.gradient import MEAN, TEMPERATURE, AggregateScale, GradientConfig
from varshare_rl.optim.ivon import Ivon
from varshare_rl.optim.jacobian import GradientAggregator, TaskGradients, gradient_gram
from varshare_rl.optim.optimizer import (
    OptimizerConfig,
    OwnGradients,
    PosteriorOptimizer,
    ScheduledAdam,
    roles,
    schedule_factor,
)
from varshare_rl.ranks import ALONE, Ranks
from varshare_rl.state import Stateful

#: A softmax weight below this is taken for it when a task's own gradient is scaled back.
_LEAST = 1e-12


class LossStep(Stateful):
    """Steps of one network: :meth:`aggregate`, :meth:`clip` and :meth:`step`, in this order.

    Tasks that the guard leaves out count as a loss of 0: the others' gradients stay as they are.

    Args:
        trained: a module, or bare parameters; layers list stacked ones in ``per_task_parameters``.
        learning_rate: of Adam, before the factors of ``optimizer``.
        max_grad_norm: bound on the norm of the whole aggregated gradient, shared and own parameters together, or
            apart from it on each task's own, as ``optimizer.own_gradients`` says; 0 switches clipping off.
        epsilon: Adam's epsilon.
        optimizer: rates, decay and schedule.
        divergence_guard: which tasks are left out of a step.
        aggregator: name of what makes one of the gradients of what the tasks share; ``gradient`` has its settings.
        num_tasks: ``T``, for aggregators that are told.
        log_temperature: ``[T]``, of the aggregator ``softmax_temperature``.
        ranks: that make the step together, each with gradients of its rows; losses are means over all of them.

    Raises:
        UserError: the aggregator needs a package that is not installed.
    """

    state_fields = ("optimizer", "ivon?", "reduction=aggregation", "guard=divergence_guard", "rate_factor?")

    def __init__(
        self,
        trained: nn.Module | Sequence[nn.Parameter],
        learning_rate: float,
        max_grad_norm: float,
        epsilon: float = 1e-8,
        optimizer: OptimizerConfig | None = None,
        divergence_guard: DivergenceGuardConfig | None = None,
        aggregator: str = MEAN,
        gradient: GradientConfig | None = None,
        num_tasks: int = 1,
        log_temperature: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.roles = roles(trained)
        self.parameters = [role.parameter for role in self.roles]
        self.max_grad_norm = max_grad_norm
        optimizer = optimizer or OptimizerConfig()
        self.ivon = _ivon(trained, optimizer)
        newton = set() if self.ivon is None else {id(each) for each in self.ivon.param_groups[0]["params"]}
        by_adam = [role for role in self.roles if id(role.parameter) not in newton]
        self.scheduled = ScheduledAdam(by_adam, learning_rate, epsilon, optimizer)
        self.optimizer = self.scheduled.adam
        self.on_cpu = all(
            parameter.is_cpu for parameter in self.parameters
        )  # looking at a number waits for nothing
        self.divergence_guard = DivergenceGuard(divergence_guard or DivergenceGuardConfig(), self.on_cpu)
        shared = [role.parameter for role in self.roles if not role.own]
        apart = optimizer.own_gradients is OwnGradients.apart or not shared  # strangers do not bound each other
        self.own = [role.parameter for role in by_adam if role.own and apart]  # what is clipped by itself
        self.unclipped = [each for each in self.parameters if id(each) in newton]  # IVON bounds its steps itself
        apart_ids = {id(each) for each in [*self.own, *self.unclipped]}
        self.together = [each for each in self.parameters if id(each) not in apart_ids]  # what is clipped as one
        self.aggregation = Aggregation()
        if aggregator == TEMPERATURE and log_temperature is not None:
            own = [role.parameter for role in self.roles if role.own]
            self.aggregation = TemperatureAggregation(own, log_temperature)
        elif shared and (chosen := (gradient or GradientConfig()).build(aggregator, num_tasks)) is not None:
            recorded = trained if isinstance(trained, nn.Module) else None
            scale = (gradient or GradientConfig()).scale
            self.aggregation = JacobianAggregation(TaskGradients(recorded, shared), chosen, scale, ranks)
        self._nothing = False  # is learnt from these losses
        self.gram: Tensor | None = None  # of the tasks' gradients, when it was last asked for
        self._gram_of: list[nn.Parameter] | None = None

    def __call__(self, losses: Tensor) -> Tensor:
        """Aggregate, clip and step; returns the norm before clipping."""
        self.aggregate(losses)
        norm = self.clip()
        self.step(norm)
        return norm

    def aggregate(self, losses: Tensor) -> None:
        """Fill the parameters' gradients from ``losses [T]``."""
        if self._gram_of is not None:
            self.gram, self._gram_of = gradient_gram(losses, self._gram_of, self.ranks), None
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        guard, kept = self.divergence_guard, None
        guard.fitting = torch.isfinite(losses)
        if guard.watches_size or not self.on_cpu or not bool(guard.fitting.all()):
            kept = guard.kept(losses, self.aggregation.waits)
        self._nothing = kept is not None and not bool(kept.any())
        if kept is not None:
            losses = torch.where(kept, losses, 0.0)
        with nullcontext() if kept is None else contained(losses):
            self.aggregation(losses, kept)
        self.ranks.average(_gradients(self.parameters))
        own = _gradients([*self.own, *self.unclipped])
        if own:  # that of its own loss: every aggregation leaves it divided by T
            torch._foreach_mul_(own, float(len(losses)))

    def clip(self) -> Tensor:
        """Bound the norm of the aggregated gradient, and apart from it that of each task's own parameters.

        Returns the norm before, 0-d: where own ones are apart, the root of the shared square plus the mean own one.
        """
        bound = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        total = nn.utils.clip_grad_norm_(self.together, bound, foreach=True).detach()
        own, unclipped = _gradients(self.own), _gradients(self.unclipped)
        if own:
            by_task = _norms_by_task(own)
            factors = (bound / (by_task + 1e-6)).clamp_max(1.0)
            for grad in own:
                grad.mul_(factors.view(-1, *[1] * (grad.dim() - 1)))
            total = (total.square() + by_task.square().mean()).sqrt()
        if unclipped:
            total = (total.square() + _norms_by_task(unclipped).square().mean()).sqrt()
        return total

    def step(self, norm: Tensor) -> None:
        """Step Adam unless the guard forbids it for a gradient of this norm; on a device, the device decides.

        And IVON, which waits for a device's decision.
        """
        guard = self.divergence_guard
        drop = None if self.on_cpu and bool(torch.isfinite(norm)) else guard.drop(norm)
        dropped = self.on_cpu and drop is not None and bool(drop)
        guard.idle = guard.idle + 1 if dropped or self._nothing else 0
        if dropped:
            return
        self.optimizer.found_inf = None if self.on_cpu else drop  # type: ignore[attr-defined]  # fused Adam obeys it
        self.optimizer.step()
        if self.ivon is not None and (self.on_cpu or drop is None or not bool(drop)):
            self.ivon.step()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All that step the parameters."""
        return [self.optimizer] if self.ivon is None else [self.optimizer, self.ivon]

    @property
    def rate_factor(self) -> float:
        """Factor on all learning rates beside that of their schedule."""
        return self.scheduled.factor

    @rate_factor.setter
    def rate_factor(self, factor: float) -> None:
        self.scheduled.factor = factor

    def measure_gram(self, parameters: Sequence[nn.Parameter]) -> None:
        """Have the next call leave :func:`gradient_gram` of its losses by ``parameters`` in :attr:`gram`.

        The step itself stays the same to the bit.
        """
        self.gram = None
        self._gram_of = list(parameters) or None

    def advance(self, fraction: float) -> None:
        """Set learning rates for when ``fraction`` of the run is done, and take note of what the guard saw."""
        self.scheduled.advance(fraction)
        if self.ivon is not None:
            self.ivon.set_rate(self.rate_factor * schedule_factor(self.scheduled.config, fraction))
        self.divergence_guard.look()

    def forget(self) -> None:
        """Start afresh for parameters that do: no moments, no running losses, no memory of the aggregation."""
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self.divergence_guard.forget()
        self.aggregation.forget()


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norms_by_task(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of each task's part of stacks ``[T, ...]``, at least one: ``[T]``."""
    norms = [torch.linalg.vector_norm(grad.reshape(len(grad), -1), dim=1) for grad in gradients]
    by_task: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return by_task


def _ivon(trained: nn.Module | Sequence[nn.Parameter], optimizer: OptimizerConfig) -> Ivon | None:
    """Return IVON for the posteriors of ``trained`` if it is chosen and there are any."""
    if optimizer.posteriors is not PosteriorOptimizer.ivon or not isinstance(trained, nn.Module):
        return None
    layers = [layer for _, layer in drawn_layers(trained) if layer.posteriors()]
    return Ivon(layers, optimizer.ivon) if layers else None


class Aggregation(Stateful):
    """From losses ``[T]`` to the gradient of every parameter: that of the mean, unless a subclass says otherwise.

    Own parameters of a task get the gradient of the mean, ``1 / T`` times that of its loss, from every aggregation.
    """

    waits = False  # True: it reads numbers from the device anyway

    def __call__(self, losses: Tensor, kept: Tensor | None) -> None:
        """Fill ``grad``. ``kept [T]`` bool: the tasks that count; the others' losses are 0, without a gradient."""
        torch.autograd.backward(losses.mean())

    def memory_bytes(self, num_tasks: int) -> int:
        """Predict the bytes of its gradients per task; a look for mixing takes as many again for a moment."""
        return 0

    def forget(self) -> None:
        """Remember nothing, as at the start."""


class TemperatureAggregation(Aggregation):
    """The tasks' losses weighed by ``softmax_i(-log alpha_i)`` in what they share (Yang et al. 2020, section 4.3).

    ``alpha_i`` is the entropy coefficient of SAC: a task whose policy is still at random, with a large one,
    counts for less.

    Args:
        own: the parameters whose dim 0 is the task.
        log_temperature: ``log alpha [T]``, the one that learns.
    """

    def __init__(self, own: Sequence[nn.Parameter], log_temperature: Tensor) -> None:
        self.own, self.log_temperature = list(own), log_temperature

    def __call__(self, losses: Tensor, kept: Tensor | None) -> None:
        weights = torch.softmax(-self.log_temperature.detach(), 0).clamp_min(_LEAST)
        torch.autograd.backward(torch.dot(weights, losses))
        back = 1.0 / (weights * len(losses))
        for parameter in self.own:
            if parameter.grad is not None:
                parameter.grad.mul_(back.view(-1, *[1] * (parameter.dim() - 1)))


class JacobianAggregation(Aggregation):
    """An aggregate of the tasks' gradients for what they share, of its paper's length or as long as their mean.

    Lengths of papers are of all kinds: FairGrad's is ``sqrt(T)`` whatever the losses, those of MGDA and IMTL-G are
    a hundredth of the mean's. Clipping reads that as a change of the losses.
    """

    waits = True
    state_fields = ("gradients", "combiner=aggregator")

    def __init__(
        self, gradients: TaskGradients, aggregator: GradientAggregator, scale: AggregateScale, ranks: Ranks = ALONE
    ) -> None:
        self.gradients, self.aggregator, self.scale, self.ranks = gradients, aggregator, scale, ranks

    def __call__(self, losses: Tensor, kept: Tensor | None) -> None:
        if len(losses) == 1:
            torch.autograd.backward(losses.mean())
            return
        rows = self.gradients(losses)
        self.ranks.average([rows])
        reached = self.gradients.reached
        combined = self.aggregator(rows, losses.detach(), kept)
        if self.scale is AggregateScale.mean:
            length = combined.norm()
            combined = combined * torch.where(length > 0, rows.sum(0).norm() / length, 1.0)
        for index, gradient in enumerate(self.gradients.views(combined)):
            if index in reached:
                self.gradients.shared[index].grad = gradient

    def memory_bytes(self, num_tasks: int) -> int:
        return 0 if num_tasks == 1 else num_tasks * sum(parameter.nbytes for parameter in self.gradients.shared)

    def forget(self) -> None:
        self.aggregator.forget()
