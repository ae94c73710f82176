"""Improved variational online Newton (IVON; Shen et al. 2024) for the posteriors of a network's layers.

With ``c`` what a nat costs in a task's loss, ``N(m_0, p^2)`` the prior and ``delta = c / p^2``, a posterior
``N(m, s^2)`` has ``s^2 = c / (h + delta)``, where ``h`` follows the loss's curvature. At every step (Shen et al.
2024, algorithm 1, with ``lambda = 1 / c``)

    h_hat = (dL/ds) / s                            which is g (w - m) / s^2 of the draw w
    h <- b2 h + (1 - b2) h_hat + (1 - b2)^2 (h - h_hat)^2 / (2 (h + delta))
    m <- m - rate (g_bar + delta (m - m_0)) / (h + delta)

with ``g_bar`` the running mean of ``g``, corrected for its start. That ``h + delta`` stays positive holds for a
price that stays; here it falls with the data and moves with the critic's scale, so ``h`` is held above
``-3/4 delta``: no posterior is wider than twice its prior. Gradients that come here are of the loss with its
divergence, whose part ``delta (m - m_0)`` and ``delta s - c / s`` is known and taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varshare_rl.fields import bounded
from varshare_rl.nn.stochastic import GaussianFactors
from varshare_rl.ops.gaussian import inverse_softplus, softplus_sigma

#: Least cost of a nat: without any, posteriors have no width.
_LEAST_PRICE = 1e-30
#: Least curvature of the loss over ``delta``.
_LEAST_CURVATURE = -0.75


@dataclass
class IvonConfig:
    """Options of ``optimizer.ivon``, which count with ``optimizer.posteriors=ivon``."""

    rate: float = bounded(1.0, above=0)
    "Length of the means' steps, in Newton steps."
    width: float = bounded(0.3, above=0, below=1)
    "Widest standard deviation of a posterior at its first step, over that of its prior; narrower ones stay."
    beta_1: float = bounded(0.9, least=0, below=1)
    "Decay of the running mean of gradients."
    beta_2: float = bounded(0.999, least=0, below=1)
    "Decay of the running curvature."
    bound: float = bounded(0.05, above=0)
    "Longest step of a mean, in standard deviations of its prior."


class Ivon(torch.optim.Optimizer):
    """Steps of the means and widths of ``layers``; :meth:`pay` says before each what nats cost.

    Steps are ``rate`` Newton steps long. The state of a mean is ``momentum`` and ``curvature`` in its
    shape; a task whose curvature is 0 throughout has not begun.
    """

    def __init__(self, layers: Sequence[GaussianFactors], config: IvonConfig) -> None:
        self.layers, self.config = list(layers), config
        super().__init__(
            [parameter for layer in self.layers for pair in layer.posteriors() for parameter in pair],
            {"lr": config.rate},
        )
        self._price = torch.ones(1)

    def pay(self, price: Tensor | float) -> None:
        """Take note of what a nat of each task costs in the losses of the next steps, ``[T]`` or one for all."""
        self._price = torch.as_tensor(price).detach().reshape(-1)

    def set_rate(self, factor: float) -> None:
        """Have the next steps be ``factor`` times as long as the configured ones."""
        self.param_groups[0]["lr"] = self.config.rate * factor

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every factor that has gradients."""
        rate = self.param_groups[0]["lr"]
        for layer in self.layers:
            for (mu, rho), prior in zip(layer.posteriors(), layer.prior(), strict=True):
                if mu.grad is not None and rho.grad is not None:
                    self._step(mu, rho, prior, rate)

    def _step(self, mu: Tensor, rho: Tensor, prior: tuple[Tensor, Tensor], rate: float) -> None:
        assert mu.grad is not None
        assert rho.grad is not None
        config, (home, scale) = self.config, prior
        state = self.state[mu]
        if not state:
            state.update(step=torch.zeros(()), momentum=torch.zeros_like(mu), curvature=torch.zeros_like(mu))
        state["step"] += 1
        momentum, curvature = state["momentum"], state["curvature"]
        by_task = (-1, *[1] * (mu.dim() - 1))
        price = self._price.to(mu).clamp_min(_LEAST_PRICE).view(by_task)
        delta, sigma = price / scale.square(), softplus_sigma(rho)
        seen = (rho.grad / torch.sigmoid(rho) + price / sigma) / sigma - delta
        begun = curvature.flatten(1).any(1).view(by_task)
        if not bool(begun.all()):
            first = price / torch.minimum(sigma, config.width * scale).square() - delta
            curvature.copy_(torch.where(begun, curvature, first))
        least = _LEAST_CURVATURE * delta
        torch.maximum(curvature, least, out=curvature)  # what was allowed at another price
        left = 1.0 - config.beta_2
        missed = (seen - curvature).square_().div_(curvature + delta).mul_(0.5 * left**2)
        curvature.lerp_(seen, left).add_(missed)
        torch.maximum(curvature, least, out=curvature)
        pull = delta * (mu - home)
        momentum.lerp_(mu.grad - pull, 1.0 - config.beta_1)
        total = curvature + delta
        change = pull.add_(momentum, alpha=1.0 / (1.0 - config.beta_1 ** float(state["step"]))).div_(total)
        longest = config.bound * scale
        mu.sub_(torch.minimum(torch.maximum(change.mul_(rate), -longest), longest))
        rho.copy_(inverse_softplus((price / total).sqrt()))
