"""Layers of networks for several tasks: their answers, their initial values, their stacks that grow and shrink."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from varshare_rl.errors import UserError
from varshare_rl.nn.task_rows import TaskRows, unknown_task
from varshare_rl.ops.gradient_record import GradientRecord, Recorder
from varshare_rl.ops.low_rank import LowRank
from varshare_rl.ops.task_weights import TaskWeights

#: Standard deviation of the initial ``mus_A``.
INITIAL_MU_STD = 0.01
#: Initial ``rho`` of every posterior: ``softplus(-5) = 0.0067``.
INITIAL_RHO = -5.0


class TaskModule(nn.Module):
    """Module that keeps parameters or buffers per task, stacked: their dim 0 counts the tasks.

    Attributes:
        per_task_parameters, per_task_buffers: names of the stacked tensors.
        rho_parameters: names of the parameters among them that give standard deviations.
        b_parameters: names of those among them that are the factor ``B`` of low-rank residuals, or its mean.
        is_adapter: all its parameters are a task's own correction of weights that are not among them.
        penalized: the weights of a task cost nats, see :meth:`kl`.
        paid_apart: somebody else adds :meth:`kl` to the loss, and the ELBO does not.
    """

    per_task_parameters: tuple[str, ...] = ()
    per_task_buffers: tuple[str, ...] = ()
    rho_parameters: tuple[str, ...] = ()
    b_parameters: tuple[str, ...] = ()
    is_adapter = False
    penalized = False
    paid_apart = False

    @property
    def num_tasks(self) -> int:
        """Number of tasks that are kept apart, ``T``; 0 for a module that is the same for all."""
        return len(getattr(self, self.per_task_parameters[0])) if self.per_task_parameters else 0

    @property
    def penalized_size(self) -> int:
        """Number of one task's weights that :meth:`kl` is about."""
        return 0

    def kl(self) -> Tensor:
        """Nats that each task's weights cost, ``[T]``; asked of ``penalized`` modules alone."""
        raise NotImplementedError(f"{type(self).__name__} is penalized and does not say what its weights cost")


@dataclass(frozen=True)
class AbsorptionMove:
    """Move of a layer's common residual into its shared weight, in float64; see :mod:`varshare_rl.nn.absorb`.

    Attributes:
        step: what is added to ``theta``.
        means: the new means, by parameter name.
        error: change of each task's mean weight, ``[T]``, relative to the larger residual of before and after.
        cost_before, cost_after: nats of the means, ``[T]``.
        rescaled: parameters whose gradients change their size by the move, so that an optimiser's moments of them
            no longer fit.
    """

    step: Tensor
    means: dict[str, Tensor]
    error: Tensor
    cost_before: Tensor
    cost_after: Tensor
    rescaled: tuple[str, ...] = ()


class TaskLayer(TaskModule):
    """Linear layer ``layer(x, task_id, temperature)``; what is done with trained networks, it answers for itself.

    A layer of one's own gives ``forward`` and those methods that it has an answer to. The rest of the package goes
    by them: networks and agents are folded (:meth:`mean_linear`), exported as adapters (:meth:`shared_linear`,
    :meth:`correction`, :meth:`task_rho`), compared (:meth:`task_weights`), pruned (:meth:`unit_nats`,
    :meth:`unit_snr`, :meth:`set_to_prior`, :meth:`residual`), absorbed (:meth:`absorption`) and asked how sure they
    are (:meth:`output_variance`, :meth:`projected_variance`). The answers given here are those of a layer without
    such a thing.

    Args:
        in_features: size of the input, ``F``.
        out_features: size of the output, ``G``.

    Attributes:
        theta: shared weight ``[G, F]``, where there is one; bias: ``[G]`` or None.
        recorder: takes the gradients of ``theta`` and ``bias`` per task; None: nobody wants them.
    """

    theta: Tensor
    bias: Tensor | None
    recorder: Recorder | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features

    def linear_parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """The weight ``[..., G, F]`` and the bias ``[..., G]`` that it starts with, before corrections."""
        return self.get_parameter("theta"), None if self.bias is None else self.get_parameter("bias")

    def record(self, ids: Tensor | None = None) -> GradientRecord | None:
        """Record for a product with ``theta``, for blocks that are the tasks in order (``ids`` is None).

        Only then is a block's gradient that of a task.
        """
        if self.recorder is None or ids is not None:
            return None
        return GradientRecord(self.recorder, self.theta, self.bias)

    def check_task(self, task: int) -> None:
        """Raise IndexError for a task that the layer does not know."""
        if self.num_tasks and not 0 <= task < self.num_tasks:
            raise unknown_task(task, self.num_tasks)

    def mean_linear(self, task: int) -> nn.Linear:
        """The layer of one task on the posterior mean, as a plain one with copies of the weights.

        Raises:
            UserError: the layer has no such weight.
        """
        try:
            shared, part = self.shared_linear(), self.correction(task)
        except UserError:
            raise UserError(f"a {type(self).__name__} has no weight of one task to fold") from None
        if part is None:
            return shared
        return plain_linear(torch.addmm(shared.weight, part.b, part.a, alpha=part.scale), shared.bias)

    def shared_linear(self) -> nn.Linear:
        """The layer ``theta, bias`` that low-rank corrections correct, as a plain one with copies.

        Raises:
            UserError: the layer is not one shared weight with, or without, low-rank corrections.
        """
        raise UserError(
            f"a {type(self).__name__} has no low-rank correction that could be an adapter; networks of "
            "network=varshare_lora, lora, and l2_soft with a rank have"
        )

    def correction(self, task: int) -> LowRank | None:
        """Copies of one task's factors, or of the means of their posteriors; None without a correction."""
        return None

    def task_rho(self, task: int) -> dict[str, Tensor]:
        """``rho_A``, ``rho_B`` and ``prior_scale``, which a correction has no room for; else empty."""
        return {}

    def task_weights(self) -> TaskWeights | None:
        """Mean weights of all tasks with their deviations, see :mod:`varshare_rl.nn.sharing`; None without."""
        return None

    def residual(self, task: int) -> Tensor:
        """``R_i [G, F]`` of the mean weight ``theta + R_i``."""
        part = self.correction(task)
        return torch.zeros_like(self.theta) if part is None else part.delta()

    def unit_nats(self) -> Tensor | None:
        """Nats per Gaussian of each unit of the residuals that is pruned as one; None without posteriors."""
        return None

    def unit_snr(self) -> Tensor | None:
        """Signal-to-noise of each unit; the units may be others than those of :meth:`unit_nats`."""
        return None

    def set_to_prior(self, kept: Tensor) -> None:
        """Set the units that are not ``kept`` to the prior, in place."""
        raise NotImplementedError(f"{type(self).__name__} has units and does not set them to the prior")

    def absorption(self, rate: float) -> AbsorptionMove | None:
        """The move of ``rate`` times the mean residual into ``theta``; None for a layer that absorbs nothing."""
        return None

    def output_variance(self, rows: TaskRows, temperature: float) -> Tensor:
        """Variance of the output over the posterior for known inputs, ``[K, B, G]``; asked of posteriors alone."""
        raise NotImplementedError(f"{type(self).__name__} does not give the variance of its output")

    def projected_variance(self, x: Tensor, slope: Tensor, temperature: float) -> Tensor:
        """``Var(slope . W x)`` over the posterior: ``x [T, B, F]`` and ``slope [T, B, G]`` to ``[T, B]``."""
        raise NotImplementedError(f"{type(self).__name__} does not give the variance of its output")

    def extra_repr(self) -> str:
        tasks = f", num_tasks={self.num_tasks}" if self.num_tasks else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{tasks}"


def task_layers(module: nn.Module) -> Iterator[tuple[str, TaskLayer]]:
    """All task layers inside ``module`` with their dotted names, in order."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, TaskLayer))


def posterior_layers(module: nn.Module) -> Iterator[tuple[str, TaskLayer]]:
    """Task layers inside ``module`` with posteriors over their own weights, as :func:`task_layers`."""
    return ((name, layer) for name, layer in task_layers(module) if layer.rho_parameters)


def penalized_layers(module: nn.Module) -> Iterator[tuple[str, TaskModule]]:
    """All parts of ``module`` whose weights per task cost something, with their dotted names, in order."""
    children = module.named_modules()
    return ((name, child) for name, child in children if isinstance(child, TaskModule) and child.penalized)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """``nn.Linear`` with copies of a weight ``[G, F]`` and a bias ``[G]``."""
    outputs, inputs = weight.shape
    kind = {"device": weight.device, "dtype": weight.dtype}
    layer: nn.Linear = skip_init(nn.Linear, inputs, outputs, bias is not None, **kind)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def check_positive(**sizes: float) -> None:
    """Raise ValueError naming the first argument that is not positive."""
    for name, size in sizes.items():
        if size <= 0:
            raise ValueError(f"{name} is {size}; it must be positive")


def linear_parameters(
    in_features: int, out_features: int, bias: bool, copies: tuple[int, ...] = ()
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight ``[*copies, out, in]`` and bias ``[*copies, out]`` as ``torch.nn.Linear`` starts them.

    Kaiming uniform with ``a = sqrt(5)``, which is the uniform distribution on ``+-1 / sqrt(in)``; the same
    range for the bias.
    """
    bound = 1.0 / math.sqrt(in_features)
    weight = nn.Parameter(torch.empty(*copies, out_features, in_features).uniform_(-bound, bound))
    return weight, nn.Parameter(torch.empty(*copies, out_features).uniform_(-bound, bound)) if bias else None


def stack_tasks(module: nn.Module, fresh: Mapping[str, Tensor]) -> None:
    """Append the rows of ``fresh`` to the stacked parameters of the same names."""
    with torch.no_grad():
        for name, rows in fresh.items():
            old = module.get_parameter(name)
            setattr(module, name, nn.Parameter(torch.cat([old, rows]), requires_grad=old.requires_grad))


def unstack_tasks(module: nn.Module, names: Sequence[str], task_ids: Sequence[int], num_tasks: int) -> Tensor:
    """Drop the rows ``task_ids`` of the stacked parameters ``names``; returns the ids that are kept.

    Raises:
        IndexError: an id is not one of the tasks.
        ValueError: no task would be left.
    """
    unknown = [task for task in task_ids if not 0 <= task < num_tasks]
    if unknown:
        raise unknown_task(unknown[0], num_tasks)
    keep = torch.tensor([task for task in range(num_tasks) if task not in set(task_ids)], dtype=torch.int64)
    if len(keep) == 0:
        raise ValueError(f"removing tasks {list(task_ids)} would leave none of {num_tasks}")
    with torch.no_grad():
        for name in names:
            old = module.get_parameter(name)
            rows = old.index_select(0, keep.to(old.device))
            setattr(module, name, nn.Parameter(rows, requires_grad=old.requires_grad))
    return keep
