"""A small model with attention to adapt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 6


class Attention(nn.Module):
    """One block of self-attention ``[N, length, F]``."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(SIZE, SIZE) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return x + self.out_proj(y)


class Model(nn.Module):
    """An embedding, two blocks of attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, SIZE)
        self.blocks = nn.Sequential(Attention(), Attention())
        self.head = nn.Linear(SIZE, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens)))  # type: ignore[no-any-return]


TARGETS = ["q_proj", "v_proj"]
PATHS = [f"blocks.{block}.{name}" for block in (0, 1) for name in TARGETS]


def tokens(rows: int = 7) -> Tensor:
    return torch.randint(9, (rows, 4))
