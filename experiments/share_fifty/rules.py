"""Sequence rules, and a small transformer that learns them.

A family of sequences is a rule ``(delay, shift)``: of random digits ``x``, the answer at position ``t`` is
``y_t = (x_{t - delay} + shift) mod 10``. A sequence starts with two tokens that may say which rule it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIGITS = 10
DELAYS, SHIFTS = 6, 10
LENGTH = 20
FAMILIES = [(delay, shift) for delay in range(DELAYS) for shift in range(SHIFTS)]
UNKNOWN = DIGITS + DELAYS + SHIFTS  # the token that says nothing
TOKENS = UNKNOWN + 1


def sequences(rules: Tensor, told: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of rules ``[N, 2]``: tokens ``[N, 2 + LENGTH]``, answers ``[N, LENGTH]``, -1 where there is none.

    ``told`` puts the rule into the first two tokens.
    """
    count = len(rules)
    digits = torch.randint(DIGITS, (count, LENGTH), generator=generator)
    delay, shift = rules[:, :1], rules[:, 1:]
    source = torch.arange(LENGTH) - delay
    answers = (digits.gather(1, source.clamp_min(0)) + shift) % DIGITS
    answers = torch.where(source < 0, torch.full_like(answers, -1), answers)
    start = torch.cat([DIGITS + delay, DIGITS + DELAYS + shift], dim=1)
    start = start if told else torch.full_like(start, UNKNOWN)
    return torch.cat([start, digits], dim=1), answers


class Attention(nn.Module):
    """Causal self-attention with separate projections, which adapters can find by name."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, S, width]`` to the same."""
        q, k, v = (
            proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a feed-forward net, each after a LayerNorm and beside a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, S, width]`` to the same."""
        x = x + self.attention(self.norm_a(x))
        out: Tensor = x + self.feed(self.norm_b(x))
        return out


class Transformer(nn.Module):
    """Tokens ``[N, 2 + LENGTH]`` to logits of the answers ``[N, LENGTH, DIGITS]``."""

    def __init__(self, width: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, width), nn.Embedding(2 + LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, DIGITS)

    def forward(self, tokens: Tensor) -> Tensor:
        """See above."""
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 2:]))
        return logits


def loss_of(model: nn.Module, tokens: Tensor, answers: Tensor) -> Tensor:
    """Mean cross entropy of the answers that there are."""
    return F.cross_entropy(model(tokens).flatten(0, 1), answers.flatten(), ignore_index=-1)


@torch.no_grad()
def accuracy(model: nn.Module, rule: tuple[int, int], told: bool = False, count: int = 128) -> float:
    """Share of right answers on fresh sequences of one rule, always the same ones."""
    generator = torch.Generator().manual_seed(10_000 + 100 * rule[0] + rule[1])
    tokens, answers = sequences(torch.tensor([rule]).expand(count, 2), told, generator)
    there = answers >= 0
    return float((model(tokens).argmax(2) == answers)[there].float().mean())
