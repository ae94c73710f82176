"""Meaning of the outputs of policies and critics, for methods that measure how much they change."""

from __future__ import annotations

import torch
from torch import Tensor

from varshare_rl.nn.actor import Actor, CategoricalActor, GaussianActor
from varshare_rl.nn.critic import CriticHead, TaskAffine
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


class CategoricalOutputs:
    """Outputs are logits of choices, or of a categorical critic's atoms, ``[1, N, A]``.

    Args:
        mask: ``[1, 1, A]`` bool, False for choices that the task does not have.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def complete(self, outputs: Tensor) -> Tensor:
        """Return the outputs, which say all."""
        return outputs

    def sampled_log_prob(self, outputs: Tensor) -> Tensor:
        """Return the log-probability of a choice that is drawn, ``[1, N]``."""
        log_probs = masked_logits(outputs, self.mask)
        uniform = torch.rand_like(log_probs).clamp_min_(1e-20)
        choice = (log_probs.detach() - (-uniform.log()).log()).argmax(-1, keepdim=True)  # the Gumbel-max trick
        return log_probs.gather(-1, choice).squeeze(-1)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Return ``sum_a p_old(a) log(p_old(a) / p_new(a))``, ``[1, N]``."""
        log_old, log_new = (masked_logits(part, self.mask) for part in (old, new))
        return (log_old.exp() * (log_old - log_new)).sum(-1)


class UnitGaussian:
    """Outputs are values with noise of variance 1, as the squared error has them, ``[1, N, 1]``.

    Under PopArt the values are ``a h + c`` of outputs ``h``, and noise and divergence those of the values.

    Args:
        affine: gives ``a [1]``, the scale of the one task; None: the outputs are the values.
    """

    def __init__(self, affine: TaskAffine | None = None) -> None:
        self.affine = affine

    def _scale(self, like: Tensor) -> Tensor:
        return torch.ones_like(like) if self.affine is None else self.affine.scale.detach().to(like).expand_as(like)

    def complete(self, outputs: Tensor) -> Tensor:
        """Return the outputs, under PopArt with the scale beside them."""
        if self.affine is None or outputs.shape[-1] > 1:  # complete
            return outputs
        return torch.cat([outputs, self._scale(outputs)], dim=-1)

    def sampled_log_prob(self, outputs: Tensor) -> Tensor:
        """Return ``log N(y | values, 1)`` of ``y`` drawn from it, ``[1, N]``; an offset would change nothing."""
        values = outputs * self._scale(outputs)
        noisy = (values + torch.randn_like(values)).detach()
        return normal_log_prob(noisy, values, torch.zeros_like(values)).sum(-1)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Return ``a^2 (old - new)^2 / 2``, ``[1, N]``, with the scale of the old outputs if they have it."""
        old, scale = old[..., :1], old[..., 1:] if old.shape[-1] > 1 else self._scale(old)
        return 0.5 * (scale * (old - new)).square().sum(-1)


def policy_likelihood(actor: Actor) -> GaussianPolicy | CategoricalOutputs:
    """Return the meaning of an actor's outputs; its action mask is that of one task."""
    if isinstance(actor, CategoricalActor):
        return CategoricalOutputs(actor.action_mask.bool())
    return GaussianPolicy(actor)


def value_likelihood(head: CriticHead) -> UnitGaussian | CategoricalOutputs:
    """Return the meaning of the outputs of a critic's network, of one task, which ``head`` reads."""
    if head.categorical:
        return CategoricalOutputs(torch.ones(1, 1, len(head.atoms), dtype=torch.bool, device=head.atoms.device))
    return UnitGaussian(head.affine)
