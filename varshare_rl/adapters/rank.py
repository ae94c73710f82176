"""The rank that an adapter needs: by its singular values, or by what its posterior paid for."""

from __future__ import annotations

from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter, LowRank
from varshare_rl.adapters.agent import plain_paths
from varshare_rl.nn.layer import TaskLayer
from varshare_rl.ops.low_rank import decompose


def needed_ranks(adapter: Adapter, max_error: float = 0.05) -> dict[str, int]:
    """Return for every module the least rank whose best approximation is within a relative error of ``dW``.

    With the singular values ``s_1 >= s_2 >= ...`` of ``dW`` it is the least ``k`` with ``sum_{j>k} s_j^2 <=
    max_error^2 sum_j s_j^2`` (Eckart and Young 1936), and 1 for a correction of nothing.

    Raises:
        ValueError: ``max_error`` is not at least 0 and below 1.
    """
    if not 0.0 <= max_error < 1.0:
        raise ValueError(f"max_error is {max_error}; it must be at least 0 and below 1")
    return {path: _least(_decomposed(factors)[1], max_error) for path, factors in adapter.items()}


def truncated(adapter: Adapter, max_error: float = 0.05) -> Adapter:
    """Return an adapter cut to :func:`needed_ranks`, with balanced float32 factors and scale 1. Errors as there."""
    cut = {}
    for path, rank in needed_ranks(adapter, max_error).items():
        u, singular, vh = _decomposed(adapter[path])
        root = singular[:rank].sqrt()
        cut[path] = LowRank((root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float())
    return cut


def posterior_ranks(network: nn.Module, task: int, least_nats: float = 0.01) -> dict[str, int]:
    """Return for every low-rank layer with a posterior the number of components that say more than the prior.

    A component counts with a divergence of at least ``least_nats`` per Gaussian, as for ``prune``; paths are those
    of :func:`~varshare_rl.adapters.agent.task_adapter`.

    Raises:
        IndexError: an unknown task id.
        UserError: a layer has neither a shared weight nor a low-rank correction.
    """
    ranks = {}
    for own, path in plain_paths(network).items():
        layer = network.get_submodule(own)
        assert isinstance(layer, TaskLayer)
        layer.check_task(task)
        nats = layer.unit_nats()
        if nats is not None and nats.dim() == 2:
            ranks[path] = int((nats[task] >= least_nats).sum())
    return ranks


def _decomposed(factors: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``u [out, k]``, singular values ``[k]`` and ``vh [>= k, in]`` of a correction in float64."""
    u, singular, vh = decompose(factors.a.double()[None], factors.scale * factors.b.double()[None])
    return u[0], singular[0], vh[0]


def _least(singular: Tensor, max_error: float) -> int:
    squares = singular.square()
    left = squares.sum() - squares.cumsum(0)
    return min(int((left > max_error**2 * squares.sum() + 1e-14 * squares.sum()).sum()) + 1, len(singular))
