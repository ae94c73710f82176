"""The one place where losses per task become a gradient and a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varshare_rl.optim.conflict import gradient_gram


class LossStep:
    """Combine losses per task, clip the gradient's norm, and step Adam.

    The combination is the mean over tasks.

    Args:
        parameters: what is trained.
        learning_rate: of Adam.
        max_grad_norm: bound on the norm of the whole gradient; 0 switches clipping off.
        epsilon: Adam's epsilon.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        learning_rate: float,
        max_grad_norm: float,
        epsilon: float = 1e-8,
    ) -> None:
        self.parameters = list(parameters)
        self.max_grad_norm = max_grad_norm
        self.gram: Tensor | None = None  # of the tasks' gradients, when it was last asked for
        self._gram_of: list[nn.Parameter] | None = None
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, eps=epsilon, fused=True)

    def __call__(self, losses: Tensor) -> Tensor:
        """Step on the mean of ``losses [T]``; returns the norm of the gradient before clipping."""
        if self._gram_of is not None:
            self.gram, self._gram_of = gradient_gram(losses, self._gram_of), None
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.mean())
        bound = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(self.parameters, bound, foreach=True)
        self.optimizer.step()
        return norm.detach()

    def measure_gram(self, parameters: Sequence[nn.Parameter]) -> None:
        """Have the next call leave :func:`gradient_gram` of its losses by ``parameters`` in :attr:`gram`.

        The step itself stays the same to the bit.
        """
        self.gram = None
        self._gram_of = list(parameters) or None
