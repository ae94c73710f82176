"""Intrinsic dimension: the fewest numbers that a model has to learn for a task (Li et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from varshare_rl.errors import UserError
from varshare_rl.nn.layer import check_positive

#: Trains what requires a gradient in a model and returns its score, the higher the better.
Train = Callable[[nn.Module], float]


class RandomSubspace(nn.Module):
    """A model whose trained parameters are ``theta_0 + P z``, where ``z [d]`` alone is trained.

    ``P [D, d]`` is random and fixed, Gaussian with columns of length 1; ``theta_0`` are the parameters of ``model``
    that require a gradient, ``D`` numbers in all. The model itself is copied.

    Args:
        model: any module.
        dimension: ``d``.
        seed: of ``P``.

    Raises:
        UserError: ``model`` has fewer than ``d`` numbers to train.
    """

    projection: Tensor

    def __init__(self, model: nn.Module, dimension: int, seed: int = 0) -> None:
        super().__init__()
        check_positive(dimension=dimension)
        self.model = deepcopy(model)
        self.names = [name for name, value in self.model.named_parameters() if value.requires_grad]
        self.model.requires_grad_(False)
        self.sizes = [self.model.get_parameter(name).numel() for name in self.names]
        if dimension > sum(self.sizes):
            raise UserError(f"dimension is {dimension}; the model has {sum(self.sizes)} numbers to train")
        like = self.model.get_parameter(self.names[0])
        drawn = torch.randn(sum(self.sizes), dimension, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("projection", (drawn / drawn.norm(dim=0)).to(like))
        self.z = nn.Parameter(like.new_zeros(dimension))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its parameters in the subspace."""
        moves = torch.split(self.projection @ self.z, self.sizes)
        start = {name: self.model.get_parameter(name) for name in self.names}
        values = {name: own + move.view_as(own) for (name, own), move in zip(start.items(), moves, strict=True)}
        return functional_call(self.model, values, args, kwargs)


@dataclass(frozen=True)
class IntrinsicDimension:
    """Scores by dimension of the subspace.

    Attributes:
        scores: by ``d``; full: of all parameters.
        dimension: the least ``d`` that is good enough; None: none of them.
    """

    scores: dict[int, float]
    full: float
    dimension: int | None


def intrinsic_dimension(
    model: nn.Module, train: Train, dimensions: Sequence[int], fraction: float = 0.9, seed: int = 0
) -> IntrinsicDimension:
    """Measure the least dimension of a random subspace that learns a task nearly as well as all weights.

    Trains copies of ``model`` in subspaces of growing dimension, until a score reaches ``fraction`` of that of all
    parameters; ``d_int90`` of the source is that of 0.9.

    Args:
        model: in the state to begin from; adapters on a frozen model count alone.
        train: trains a model and returns its score, not negative.
        dimensions: to try, in any order.
        fraction: of the full score.
        seed: of the subspaces.

    Raises:
        UserError: a dimension is larger than the model.
    """
    full = train(deepcopy(model))
    scores: dict[int, float] = {}
    for dimension in sorted(set(dimensions)):
        scores[dimension] = train(RandomSubspace(model, dimension, seed))
        if scores[dimension] >= fraction * full:
            return IntrinsicDimension(scores, full, dimension)
    return IntrinsicDimension(scores, full, None)
