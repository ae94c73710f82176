"""Improved variational online Newton (Shen et al. 2024) for the Gaussian factors of a network's layers.

With ``c`` what a nat costs in a task's loss, ``p`` the prior's standard deviation and ``delta = c / p^2``, a
posterior ``N(m, s^2)`` has ``s^2 = c / (h + delta)``, where ``h`` follows the loss's curvature. At every step (Shen
et al. 2024, algorithm 1, with ``lambda = 1 / c``)

    h_hat = g (w - m) / s^2            of the draw w; by autograd g (w - m) = s dL/ds
    h <- b2 h + (1 - b2) h_hat + (1 - b2)^2 (h - h_hat)^2 / (2 (h + delta))
    m <- m - rate (g_bar + delta m) / (h + delta)

with ``g_bar`` the bias-corrected running mean of ``g``. No step is longer than ``bound``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from varshare_rl.nn.variational import VariationalLayer, stochastic_layers
from varshare_rl.ops.gaussian import inverse_softplus, softplus_sigma


class Ivon:
    """Steps of the factors of a module; their gradients are of the loss without the divergence.

    Args:
        module: has variational layers.
        rate: of the means, in units of a Newton step.
        width: standard deviation to begin with, over the prior's.
        beta_1, beta_2: of the running means of gradient and curvature.
        bound: on the change of a mean in one step, in units of the prior's standard deviation.
    """

    def __init__(
        self,
        module: nn.Module,
        rate: float,
        width: float = 0.3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        bound: float = 0.05,
    ) -> None:
        self.layers = [layer for _, layer in stochastic_layers(module)]
        self.rate, self.width, self.beta_1, self.beta_2, self.bound = rate, width, beta_1, beta_2, bound
        self.steps = 0
        self.means: dict[int, Tensor] = {}
        self.curvatures: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, cost: Tensor) -> None:
        """Step, and take the gradients away; ``cost [T]`` is what a nat costs in every task's loss."""
        self.steps += 1
        cost = cost.clamp_min(1e-30).view(-1, 1, 1)
        for layer in self.layers:
            for mu, rho in layer.posteriors():
                self._step(layer, mu, rho, cost)

    def _step(self, layer: VariationalLayer, mu: Tensor, rho: Tensor, cost: Tensor) -> None:
        prior = layer.prior_scale.view(-1, 1, 1)
        delta = cost / prior.square()
        if id(mu) not in self.means:
            self.means[id(mu)] = torch.zeros_like(mu)
            self.curvatures[id(mu)] = (delta / self.width**2 - delta).expand_as(mu).clone()
            rho.copy_(inverse_softplus((self.width * prior).expand_as(rho)))
        if mu.grad is None or rho.grad is None:
            return
        mean, h, sigma = self.means[id(mu)], self.curvatures[id(mu)], softplus_sigma(rho)
        seen = rho.grad / torch.sigmoid(rho) / sigma  # g (w - m) / s^2, as drho = ds sigmoid(rho)
        new = self.beta_2 * h + (1 - self.beta_2) * seen
        new += 0.5 * (1 - self.beta_2) ** 2 * (h - seen).square() / (h + delta)
        h.copy_(new)
        mean.lerp_(mu.grad, 1 - self.beta_1)
        change = self.rate * (mean / (1 - self.beta_1**self.steps) + delta * mu) / (h + delta)
        mu.sub_(torch.minimum(torch.maximum(change, -self.bound * prior), self.bound * prior))
        rho.copy_(inverse_softplus((cost / (h + delta)).sqrt()))
        mu.grad = rho.grad = None
