"""Trainable coefficients of the tasks of one layer: points, or Gaussian posteriors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varshare_rl.nn.initial import INITIAL_RHO, stack_tasks
from varshare_rl.nn.stochastic import Noise, WeightNoise
from varshare_rl.ops.gaussian import gaussian_kl_between, inverse_softplus, softplus_sigma
from varshare_rl.transfer.share.layer_basis import Coefficients
from varshare_rl.transfer.share.posterior import Gaussian


def fresh_points(count: int, k_B: int, k_A: int, p: int) -> tuple[Tensor, Tensor]:
    """``eps_B = 0`` and ``eps_A ~ N(0, 1 / k_A)``: no correction yet, and a gradient that is not 0.

    With both sides 0 neither would ever move: each one's gradient has the other as a factor.
    """
    return torch.zeros(count, k_B, p), torch.randn(count, k_A, p) / math.sqrt(k_A)


class PointCoefficients(nn.Module):
    """``eps_B [T, k_B, p]`` and ``eps_A [T, k_A, p]`` as they are.

    Args:
        num_tasks: tasks, ``T``, all fresh; see :func:`fresh_points`.
        k_B, k_A: directions of the two bases.
        p: columns.
    """

    per_task_parameters = ("eps_B", "eps_A")

    def __init__(self, num_tasks: int, k_B: int, k_A: int, p: int) -> None:
        super().__init__()
        self.eps_B, self.eps_A = (nn.Parameter(part) for part in fresh_points(num_tasks, k_B, k_A, p))

    @property
    def num_tasks(self) -> int:
        """Number of tasks, ``T``."""
        return self.eps_B.shape[0]

    def forward(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
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


class GaussianCoefficients(nn.Module):
    """Coefficients with a posterior: ``eps ~ N(mu, sigma^2)`` entry by entry, ``sigma = softplus(rho) *
    temperature``.

    Training passes draw one set of coefficients per task (reparameterised), or use the noise that is held, see
    :mod:`varshare_rl.nn.stochastic`; evaluation takes the means, which is exact for the mean weight. The prior is
    a Gaussian of its own for every coefficient, the same for all tasks; it comes from earlier tasks
    (:func:`~varshare_rl.transfer.share.posterior.prior_from_tasks`) and is not trained.

    A fresh task starts with ``mu_B = 0`` and ``mu_A`` drawn around the prior's mean, with the prior's spread but at
    most ``1 / sqrt(k_A)``: in the prior's gauge, no correction yet, and a gradient that is not 0.

    Args:
        num_tasks: tasks, ``T``, all fresh.
        prior: see above; gives the sizes.

    Attributes:
        noise: what training passes use, or None for fresh noise; theta_only: the layer leaves the coefficients out;
            paid_apart: somebody else than the ELBO adds :meth:`kl` to the loss.
    """

    estimator, weight_samples = "weight", 1
    per_task_parameters = ("mus_B", "rhos_B", "mus_A", "rhos_A")
    rho_parameters = ("rhos_B", "rhos_A")

    def __init__(self, num_tasks: int, prior: Gaussian) -> None:
        super().__init__()
        for name in ("mean_B", "std_B", "mean_A", "std_A"):
            self.register_buffer(f"prior_{name}", getattr(prior, name).clone())
        self.noise: Noise | None = None
        self.theta_only = self.paid_apart = False
        parts = self._fresh(num_tasks)
        self.mus_B, self.rhos_B, self.mus_A, self.rhos_A = (nn.Parameter(part) for part in parts)

    prior_mean_B: Tensor
    prior_std_B: Tensor
    prior_mean_A: Tensor
    prior_std_A: Tensor

    @property
    def num_tasks(self) -> int:
        """Number of tasks, ``T``."""
        return self.mus_B.shape[0]

    def forward(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """All tasks' coefficients ``[T, k_B, p], [T, k_A, p]``: a draw in training, the means otherwise."""
        if not self.training or temperature == 0.0:
            return self.mus_B, self.mus_A
        held = self.noise
        return self.drawn(held.values if isinstance(held, WeightNoise) else self.draw_noise(), temperature)

    def drawn(
        self, noise: Sequence[Tensor], temperature: float, tasks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``mu + sigma * noise`` of the given tasks (None: all in order), ``[K, k_B, p], [K, k_A, p]``."""
        pairs = ((self.mus_B, self.rhos_B), (self.mus_A, self.rhos_A))
        drawn = []
        for (mu, rho), epsilon in zip(pairs, noise, strict=True):
            ids = slice(None) if tasks is None else tasks.to(mu.device)
            drawn.append(torch.addcmul(mu[ids], softplus_sigma(rho, temperature)[ids], epsilon))
        return drawn[0], drawn[1]

    def draw_noise(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Standard normal noise for ``count`` draws of ``(eps_B, eps_A)``; None: one for each task."""
        count = self.num_tasks if count is None else count
        noise_B, noise_A = (mu.new_empty(count, *mu.shape[1:]).normal_() for mu in (self.mus_B, self.mus_A))
        return noise_B, noise_A

    def row_noise_sizes(self) -> tuple[int, int]:
        """Widths of the noise of one row in :class:`~varshare_rl.transfer.share.layer.ShareLinear`: ``p, k_B``."""
        return self.mus_B.shape[2], self.mus_B.shape[1]

    def kl(self) -> Tensor:
        """Divergence of every task's posterior from the prior, ``[T]`` nats. Temperature does not enter."""
        sides = (
            (self.mus_B, self.rhos_B, self.prior_mean_B, self.prior_std_B),
            (self.mus_A, self.rhos_A, self.prior_mean_A, self.prior_std_A),
        )
        return torch.stack(
            [gaussian_kl_between(mu, softplus_sigma(rho), mean, std).sum((1, 2)) for mu, rho, mean, std in sides]
        ).sum(0)

    def add_tasks(self, count: int = 1) -> range:
        """Append fresh tasks and return their ids; an optimiser must be given the new parameters."""
        first = self.num_tasks
        stack_tasks(self, dict(zip(self.per_task_parameters, self._fresh(count), strict=True)))
        self.noise = None
        return range(first, self.num_tasks)

    @torch.no_grad()
    def put(self, task_id: int, own: Coefficients) -> None:
        """Set one task's posterior; coefficients that are points get almost no spread."""
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

    def _fresh(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        like_B, like_A = (mean.expand(count, *mean.shape) for mean in (self.prior_mean_B, self.prior_mean_A))
        sigma = self.prior_std_A.clamp_max(1.0 / math.sqrt(like_A.shape[1]))
        mus_A = like_A + sigma * torch.randn_like(like_A)
        return (
            torch.zeros_like(like_B), torch.full_like(like_B, INITIAL_RHO),
            mus_A, torch.full_like(like_A, INITIAL_RHO),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, k={self.mus_B.shape[1]}, p={self.mus_B.shape[2]}"


def _put(target: Tensor, columns: Tensor, rest: float = 0.0) -> None:
    target.fill_(rest)
    target[:, : columns.shape[1]] = columns
