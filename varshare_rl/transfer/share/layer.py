"""A linear layer on a frozen base and a frozen basis, with coefficients per task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from varshare_rl.adapters.adapter import LowRank
from varshare_rl.errors import UserError
from varshare_rl.nn.applied_weight import AppliedWeight
from varshare_rl.nn.layer import TaskLayer, plain_linear
from varshare_rl.nn.stochastic import RowNoise
from varshare_rl.nn.task_rows import TaskIds, TaskRows, task_rows
from varshare_rl.ops.gaussian import drawn_low_rank
from varshare_rl.ops.linear import linear, low_rank_linear
from varshare_rl.ops.low_rank import wide_dtype
from varshare_rl.transfer.share.coefficients import GaussianCoefficients, PointCoefficients


class TemporaryDirections(nn.Module):
    """A trainable copy of the basis's first directions, for one task that the basis does not serve.

    ``dW = (directions_B eps_B) (directions_A eps_A)^T``. The directions start as the top ``phi`` of the basis, the
    coefficients afresh with ``eps_B = 0``. They are given up when the task is merged.

    Args:
        basis_B, basis_A: ``[out, k_B]``, ``[in, k_A]``.
        phi: number of directions; a side that has fewer has all of them.
        p: columns of the coefficients.
    """

    is_adapter = True

    def __init__(self, basis_B: Tensor, basis_A: Tensor, phi: int, p: int) -> None:
        super().__init__()
        self.directions_B = nn.Parameter(basis_B[:, :phi].clone())
        self.directions_A = nn.Parameter(basis_A[:, :phi].clone())
        have_B, have_A = self.directions_B.shape[1], self.directions_A.shape[1]
        self.eps_B = nn.Parameter(basis_B.new_zeros(have_B, p))
        self.eps_A = nn.Parameter(torch.randn(have_A, p).to(basis_A) / math.sqrt(have_A))

    def factors(self) -> tuple[Tensor, Tensor]:
        """``a [p, in]`` and ``b [out, p]``."""
        return (self.directions_A @ self.eps_A).t(), self.directions_B @ self.eps_B


class ShareLinear(TaskLayer):
    """Linear layer whose weight for task ``i`` is ``W_i = theta + (basis_B eps_B_i) (basis_A eps_A_i)^T``.

    Of this only the coefficients are trained (Share, arXiv 2602.06043, phase 2); ``theta``, ``bias`` and the bases
    are buffers, bases and coefficients in float32 at least. With ``temporary`` set, one task has a correction in
    directions of its own on top, and the coefficients rest. Neither the correction ``[out, in]`` nor a weight per
    task is built.

    Called with task ids as every layer of the project, or without them, as ``nn.Linear`` is, inside
    :func:`using_tasks`.

    Args:
        theta: ``[out, in]``; bias: ``[out]`` or None.
        basis_B: ``[out, k_B]``; basis_A: ``[in, k_A]``.
        coefficients: of all tasks.

    Attributes:
        temporary: directions of one task, or None; temporary_task: its id.
    """

    basis_B: Tensor
    basis_A: Tensor

    def __init__(
        self,
        theta: Tensor,
        bias: Tensor | None,
        basis_B: Tensor,
        basis_A: Tensor,
        coefficients: PointCoefficients | GaussianCoefficients,
    ) -> None:
        super().__init__(theta.shape[1], theta.shape[0])
        self.register_buffer("theta", theta.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        device, wide = theta.device, wide_dtype(theta.dtype)
        self.register_buffer("basis_B", basis_B.to(device, wide).clone())
        self.register_buffer("basis_A", basis_A.to(device, wide).clone())
        self.coefficients = coefficients.to(device, wide)
        self.temporary: TemporaryDirections | None = None
        self.temporary_task = 0
        self.task_ids: TaskIds | None = None  # set by using_tasks

    @property
    def num_tasks(self) -> int:
        """Number of tasks, ``T``."""
        return self.coefficients.num_tasks

    @property
    def weight(self) -> Tensor:
        """The weight of the one task of :func:`using_tasks`, for modules that read it; built at the first use."""
        return AppliedWeight.of(self.theta, self._applied_weight)

    def _applied_weight(self) -> Tensor:
        task = torch.as_tensor(-1 if self.task_ids is None else self.task_ids)
        if task.dim() or task < 0:
            raise UserError(
                "a module uses the weight of a layer with a Share basis without calling it, and there is no one "
                "task; call the model inside using_tasks(model, id) with one id"
            )
        rows = task_rows(self.theta[:1], int(task), self.num_tasks)
        a, b = self._factors(*(rows.select(eps) for eps in self.coefficients()))
        if self.temporary is not None:
            a, b = self._with_temporary(rows, a, b)
        return (self.theta + (b @ a)[0]).to(self.theta.dtype)

    def forward(self, x: Tensor, task_id: TaskIds | None = None, temperature: float = 1.0) -> Tensor:
        """Apply each row's own task's weight.

        Args:
            x: ``[T, B, F]`` with ids ``[T]``, flat ``[N, F]`` with ids ``[N]``, or any ``[..., F]`` with one id.
            task_id: see ``x``; None: those of :func:`using_tasks`.
            temperature: factor on the sigma of the coefficients' posterior; 0 gives the means.

        Raises:
            IndexError: an unknown task id.
            ValueError: shapes that do not fit each other, or nobody said which task it is.
        """
        task_id = self.task_ids if task_id is None else task_id
        if task_id is None:
            raise ValueError("no task ids: call the layer with them, or the model inside using_tasks(model, ids)")
        rows = task_rows(x, task_id, self.num_tasks)
        own = self.coefficients
        if isinstance(own, GaussianCoefficients):
            if own.theta_only:
                return rows.restore(linear(rows.x, self.theta, self.bias))
            held = own.noise if own.training and temperature > 0 else None
            if isinstance(held, RowNoise):
                return rows.restore(self._drawn_by_row(rows, own, temperature, held))
            if held is not None and held.index is not None:
                grouped, drawn = own.drawn_by_index(rows, held, temperature)
                y = self._output(grouped, *self._factors(*drawn))
                return rows.restore(grouped.restore(y).view(*rows.x.shape[:2], -1))
        a, b = self._factors(*(rows.select(eps) for eps in own(temperature)))
        if self.temporary is not None:
            a, b = self._with_temporary(rows, a, b)
        return rows.restore(self._output(rows, a, b))

    def _output(self, rows: TaskRows, a: Tensor, b: Tensor) -> Tensor:
        return low_rank_linear(rows.x, self.theta, self.bias, a, b, 1.0)

    def _factors(self, eps_B: Tensor, eps_A: Tensor) -> tuple[Tensor, Tensor]:
        """``a [K, p, in]`` and ``b [K, out, p]`` of coefficients ``[K, k, p]``."""
        return eps_A.mT @ self.basis_A.t(), self.basis_B @ eps_B

    def _drawn_by_row(
        self, rows: TaskRows, own: GaussianCoefficients, temperature: float, held: RowNoise
    ) -> Tensor:
        """With a draw of its own for every row, in two stages as in ``VarShareLoRALayer``, inside the basis."""
        (mus_B, mus_A), (var_B, var_A) = own.means(rows), own.variances(rows, temperature)
        means, variances = (mus_A.mT, mus_B), (var_A.mT, var_B)
        y = linear(rows.x, self.theta, self.bias)
        x = rows.x.to(self.basis_A.dtype)
        inside = drawn_low_rank(x @ self.basis_A, means, variances, held.values)  # [K, B, k_B]
        return (y + inside @ self.basis_B.t()).to(y.dtype)

    def _with_temporary(self, rows: TaskRows, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Append the temporary factors to those of their task's rows, and zeros to the others'."""
        assert self.temporary is not None
        ids = torch.arange(self.num_tasks) if rows.ids is None else rows.ids
        own = (ids == self.temporary_task).to(a.device)[:, None, None]
        own_a, own_b = self.temporary.factors()
        return torch.cat([a, own * own_a], dim=1), torch.cat([b, own * own_b], dim=2)

    def learn_temporarily(self, task_id: int, phi: int, p: int) -> None:
        """Give one task temporary directions to learn in; all coefficients stop training."""
        self.temporary = TemporaryDirections(self.basis_B, self.basis_A, phi, p)
        self.temporary_task = task_id
        self.coefficients.requires_grad_(False)

    def shared_linear(self) -> nn.Linear:
        return plain_linear(self.theta, self.bias)

    @torch.no_grad()
    def correction(self, task: int) -> LowRank:
        """The correction of one task's mean weight as factors, temporary directions included."""
        own = self.coefficients.take(task)
        a, b = (self.basis_A.cpu().float() @ own.eps_A).t(), self.basis_B.cpu().float() @ own.eps_B
        if self.temporary is not None and task == self.temporary_task:
            own_a, own_b = (factor.cpu().float() for factor in self.temporary.factors())
            if not own.eps_B.any():  # fresh coefficients, which are nothing and rest
                a, b = own_a, own_b
            else:
                a, b = torch.cat([a, own_a]), torch.cat([b, own_b], dim=1)
        return LowRank(a.contiguous(), b.contiguous())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k=({self.basis_B.shape[1]}, {self.basis_A.shape[1]})"


def share_layers(module: nn.Module) -> Iterator[tuple[str, ShareLinear]]:
    """All :class:`ShareLinear` inside ``module`` with their dotted names, in order."""
    for name, child in module.named_modules():
        if isinstance(child, ShareLinear):
            yield name, child


@contextmanager
def using_tasks(module: nn.Module, task_ids: TaskIds) -> Iterator[None]:
    """Inside, the layers of ``module`` that are called without task ids use these.

    For models that know nothing of tasks: one id for everything, or ids ``[N]`` for inputs whose first axis is
    ``N``.
    """
    layers = [layer for _, layer in share_layers(module)]
    before = [layer.task_ids for layer in layers]
    for layer in layers:
        layer.task_ids = task_ids
    try:
        yield
    finally:
        for layer, ids in zip(layers, before, strict=True):
            layer.task_ids = ids
