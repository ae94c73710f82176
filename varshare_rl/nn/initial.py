"""How task layers start, and how their stacked parameters grow and shrink."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

#: Standard deviation of the initial ``mus_A``.
INITIAL_MU_STD = 0.01
#: Initial ``rho`` of every posterior: ``softplus(-5) = 0.0067``.
INITIAL_RHO = -5.0


def check_positive(**sizes: float) -> None:
    """Raise ValueError naming the first argument that is not positive."""
    for name, size in sizes.items():
        if size <= 0:
            raise ValueError(f"{name} is {size}; it must be positive")


def linear_parameters(
    in_features: int, out_features: int, bias: bool, copies: tuple[int, ...] = ()
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight ``[*copies, out, in]`` and bias ``[*copies, out]`` as ``torch.nn.Linear`` starts them.

    Kaiming uniform with ``a = sqrt(5)``, which is the uniform distribution on ``+-1 / sqrt(in)``; the same
    range for the bias.
    """
    bound = 1.0 / math.sqrt(in_features)
    weight = nn.Parameter(torch.empty(*copies, out_features, in_features).uniform_(-bound, bound))
    return weight, nn.Parameter(torch.empty(*copies, out_features).uniform_(-bound, bound)) if bias else None


def stack_tasks(module: nn.Module, fresh: Mapping[str, Tensor]) -> None:
    """Append the rows of ``fresh`` to the stacked parameters of the same names."""
    with torch.no_grad():
        for name, rows in fresh.items():
            old = module.get_parameter(name)
            setattr(module, name, nn.Parameter(torch.cat([old, rows]), requires_grad=old.requires_grad))


def unstack_tasks(module: nn.Module, names: Sequence[str], task_ids: Sequence[int], num_tasks: int) -> Tensor:
    """Drop the rows ``task_ids`` of the stacked parameters ``names``; returns the ids that are kept.

    Raises:
        IndexError: an id is not one of the tasks.
        ValueError: no task would be left.
    """
    unknown = [task for task in task_ids if not 0 <= task < num_tasks]
    if unknown:
        raise IndexError(f"unknown task id {unknown[0]}: this network has {num_tasks} tasks (0 to {num_tasks - 1})")
    keep = torch.tensor([task for task in range(num_tasks) if task not in set(task_ids)], dtype=torch.int64)
    if len(keep) == 0:
        raise ValueError(f"removing tasks {list(task_ids)} would leave none of {num_tasks}")
    with torch.no_grad():
        for name in names:
            old = module.get_parameter(name)
            rows = old.index_select(0, keep.to(old.device))
            setattr(module, name, nn.Parameter(rows, requires_grad=old.requires_grad))
    return keep
