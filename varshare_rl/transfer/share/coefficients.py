"""Trainable coefficients of the tasks of one layer: points, or Gaussian posteriors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varshare_rl.nn.layer import INITIAL_RHO, TaskModule, stack_tasks
from varshare_rl.nn.stochastic import GaussianFactors, WeightNoise
from varshare_rl.ops.gaussian import inverse_softplus, softplus_sigma
from varshare_rl.transfer.share.layer_basis import Coefficients
from varshare_rl.transfer.share.posterior import Gaussian


def fresh_points(count: int, k_B: int, k_A: int, p: int) -> tuple[Tensor, Tensor]:
    """``eps_B = 0`` and ``eps_A ~ N(0, 1 / k_A)``: no correction yet, and a gradient that is not 0.

    With both sides 0 neither would ever move: each one's gradient has the other as a factor.
    """
    return torch.zeros(count, k_B, p), torch.randn(count, k_A, p) / math.sqrt(k_A)


class PointCoefficients(TaskModule):
    """``eps_B [T, k_B, p]`` and ``eps_A [T, k_A, p]`` as they are.

    Args:
        num_tasks: tasks, ``T``, all fresh; see :func:`fresh_points`.
        k_B, k_A: directions of the two bases.
        p: columns.
    """

    per_task_parameters = ("eps_B", "eps_A")
    is_adapter = True

    def __init__(self, num_tasks: int, k_B: int, k_A: int, p: int) -> None:
        super().__init__()
        self.eps_B, self.eps_A = (nn.Parameter(part) for part in fresh_points(num_tasks, k_B, k_A, p))

    def forward(self, temperature: float = 1.0) -> Sequence[Tensor]:
        """All tasks' coefficients; ``temperature`` has nothing to act on."""
        return self.eps_B, self.eps_A

    def add_tasks(self, count: int = 1) -> range:
        """Append fresh tasks and return their ids; an optimiser must be given the new parameters."""
        first, (_, k_B, p), k_A = self.num_tasks, self.eps_B.shape, self.eps_A.shape[1]
        fresh = (part.to(self.eps_B) for part in fresh_points(count, k_B, k_A, p))
        stack_tasks(self, dict(zip(self.per_task_parameters, fresh, strict=True)))
        return range(first, self.num_tasks)

    @torch.no_grad()
    def put(self, task_id: int, own: Coefficients) -> None:
        """Set one task's coefficients; columns that they lack are 0 on both sides and stay so."""
        _put(self.eps_B[task_id], own.eps_B)
        _put(self.eps_A[task_id], own.eps_A)

    @torch.no_grad()
    def take(self, task_id: int) -> Coefficients:
        """A copy of one task's coefficients."""
        return Coefficients(*(part[task_id].detach().cpu().float().clone() for part in (self.eps_B, self.eps_A)))

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, k={self.eps_B.shape[1]}, p={self.eps_B.shape[2]}"


class GaussianCoefficients(GaussianFactors):
    """Coefficients with a posterior: ``eps ~ N(mu, sigma^2)`` entry by entry, ``sigma = softplus(rho) *
    temperature``.

    Training passes draw one set of coefficients per task (reparameterised), or use the noise that is held;
    evaluation takes the means, which is exact for the mean weight. The prior is a Gaussian of its own for every
    coefficient, the same for all tasks; it comes from earlier tasks
    (:func:`~varshare_rl.transfer.share.posterior.prior_from_tasks`) and is not trained.

    A fresh task starts with ``mu_B = 0`` and ``mu_A`` drawn around the prior's mean, with the prior's sigma but at
    most ``1 / sqrt(k_A)``: in the prior's gauge, no correction yet, and a gradient that is not 0.

    Args:
        num_tasks: tasks, ``T``, all fresh.
        prior: see above; gives the sizes.
    """

    factors = (("mus_B", "rhos_B"), ("mus_A", "rhos_A"))
    is_adapter = True
    mus_B: nn.Parameter
    rhos_B: nn.Parameter
    mus_A: nn.Parameter
    rhos_A: nn.Parameter
    prior_mean_B: Tensor
    prior_std_B: Tensor
    prior_mean_A: Tensor
    prior_std_A: Tensor

    def __init__(self, num_tasks: int, prior: Gaussian) -> None:
        super().__init__()
        for name in ("mean_B", "std_B", "mean_A", "std_A"):
            self.register_buffer(f"prior_{name}", getattr(prior, name).clone())
        self.register_factors(num_tasks)

    def prior(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.prior_mean_B, self.prior_std_B), (self.prior_mean_A, self.prior_std_A)]

    def forward(self, temperature: float = 1.0) -> Sequence[Tensor]:
        """All tasks' coefficients ``[T, k_B, p], [T, k_A, p]``: a draw in training, the means otherwise."""
        if not self.training or temperature == 0.0:
            return self.mus_B, self.mus_A
        held = self.noise
        noise = held.values if isinstance(held, WeightNoise) else self.draw_noise(self.num_tasks)
        return self.drawn(noise, temperature)

    def row_noise_sizes(self) -> tuple[int, int]:
        """Widths of the noise of one row in :class:`~varshare_rl.transfer.share.layer.ShareLinear`: ``p, k_B``."""
        return self.mus_B.shape[2], self.mus_B.shape[1]

    def fresh_factors(self, num_tasks: int) -> dict[str, Tensor]:
        like_B, like_A = (mean.expand(num_tasks, *mean.shape) for mean in (self.prior_mean_B, self.prior_mean_A))
        sigma = self.prior_std_A.clamp_max(1.0 / math.sqrt(like_A.shape[1]))
        return {
            "mus_B": torch.zeros_like(like_B),
            "rhos_B": torch.full_like(like_B, INITIAL_RHO),
            "mus_A": like_A + sigma * torch.randn_like(like_A),
            "rhos_A": torch.full_like(like_A, INITIAL_RHO),
        }

    @torch.no_grad()
    def put(self, task_id: int, own: Coefficients) -> None:
        """Set one task's posterior; coefficients that are points get almost no sigma."""
        _put(self.mus_B[task_id], own.eps_B)
        _put(self.mus_A[task_id], own.eps_A)
        for rhos, eps, std in ((self.rhos_B, own.eps_B, own.std_B), (self.rhos_A, own.eps_A, own.std_A)):
            sigma = torch.zeros_like(eps) if std is None else std
            _put(rhos[task_id], inverse_softplus(sigma), rest=inverse_softplus(torch.zeros(())).item())

    @torch.no_grad()
    def take(self, task_id: int) -> Coefficients:
        """A copy of one task's posterior."""
        parts = (self.mus_B, self.mus_A, softplus_sigma(self.rhos_B), softplus_sigma(self.rhos_A))
        return Coefficients(*(part[task_id].detach().cpu().float().clone() for part in parts))

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, k={self.mus_B.shape[1]}, p={self.mus_B.shape[2]}"


def _put(target: Tensor, columns: Tensor, rest: float = 0.0) -> None:
    target.fill_(rest)
    target[:, : columns.shape[1]] = columns
