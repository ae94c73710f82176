"""Meaning of the outputs of policies and critics, for methods that measure how much they change."""

from __future__ import annotations

import torch
from torch import Tensor

from varshare_rl.nn.actor import Actor, CategoricalActor, GaussianActor
from varshare_rl.ops.gaussian import normal_log_prob
from varshare_rl.ops.rl import masked_logits


class GaussianPolicy:
    """Outputs are what an actor of one task reads as mean and log standard deviation, ``[1, N, G]``.

    Squashing or clipping is the same for old and new policies, so divergences are those before it. A log standard
    deviation that is no output is the actor's, and a task's own: both policies of a divergence have the same one,
    that of the old outputs if :meth:`complete` has added it to them.

    Args:
        actor: of one task, with its mask.
    """

    def __init__(self, actor: GaussianActor) -> None:
        self.actor, self.mask = actor, actor.action_mask

    def _parameters(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        if self.actor.log_stds is not None and outputs.shape[-1] > self.mask.shape[-1]:  # complete
            mean, log_std = outputs.chunk(2, dim=-1)
            return mean, log_std
        return self.actor.split(outputs, 0)

    def complete(self, outputs: Tensor) -> Tensor:
        """Return the outputs, and beside them the log standard deviations that are none."""
        if self.actor.log_stds is None:
            return outputs
        mean, log_std = self._parameters(outputs)
        return torch.cat([mean, log_std.to(mean)], dim=-1).detach()

    def sampled_log_prob(self, outputs: Tensor) -> Tensor:
        """Return ``log N(a | mean, std)`` of ``a`` drawn from it, ``[1, N]``."""
        mean, log_std = self._parameters(outputs)
        action = torch.addcmul(mean, log_std.exp(), torch.randn_like(mean)).detach()
        return (normal_log_prob(action, mean, log_std) * self.mask).sum(-1)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Return ``KL(N_old || N_new) = sum log(s_n / s_o) + (s_o^2 + (m_o - m_n)^2) / (2 s_n^2) - 1/2``."""
        (mean_old, log_old), (mean_new, log_new) = self._parameters(old), self._parameters(new)
        log_new = log_old if new.shape[-1] < old.shape[-1] else log_new
        squares = (2.0 * (log_old - log_new)).exp() + ((mean_old - mean_new) / log_new.exp()).square()
        return ((log_new - log_old + 0.5 * (squares - 1.0)) * self.mask).sum(-1)


class CategoricalPolicy:
    """Outputs are logits of choices, ``[1, N, A]``.

    Args:
        mask: ``[1, 1, A]`` bool, False for choices that the task does not have.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def complete(self, outputs: Tensor) -> Tensor:
        """Return the outputs, which say all."""
        return outputs

    def sampled_log_prob(self, outputs: Tensor) -> Tensor:
        """Return the log-probability of a choice drawn from the policy, ``[1, N]``."""
        log_probs = masked_logits(outputs, self.mask)
        uniform = torch.rand_like(log_probs).clamp_min_(1e-20)
        choice = (log_probs.detach() - (-uniform.log()).log()).argmax(-1, keepdim=True)  # the Gumbel-max trick
        return log_probs.gather(-1, choice).squeeze(-1)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Return ``sum_a p_old(a) log(p_old(a) / p_new(a))``, ``[1, N]``."""
        log_old, log_new = (masked_logits(part, self.mask) for part in (old, new))
        return (log_old.exp() * (log_old - log_new)).sum(-1)


class UnitGaussian:
    """Outputs are values with noise of variance 1, as the squared error has them, ``[1, N, G]``."""

    def complete(self, outputs: Tensor) -> Tensor:
        """Return the outputs, which say all."""
        return outputs

    def sampled_log_prob(self, outputs: Tensor) -> Tensor:
        """Return ``log N(y | outputs, 1)`` of ``y`` drawn from it, ``[1, N]``."""
        noisy = (outputs + torch.randn_like(outputs)).detach()
        return normal_log_prob(noisy, outputs, torch.zeros_like(outputs)).sum(-1)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Return ``(old - new)^2 / 2``, ``[1, N]``."""
        return 0.5 * (old - new).square().sum(-1)


def policy_likelihood(actor: Actor) -> GaussianPolicy | CategoricalPolicy:
    """Return the meaning of an actor's outputs; its action mask is that of one task."""
    if isinstance(actor, CategoricalActor):
        return CategoricalPolicy(actor.action_mask.bool())
    return GaussianPolicy(actor)
