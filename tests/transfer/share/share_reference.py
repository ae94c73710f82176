"""Share once more, slowly and plainly: dense float64 matrices in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from varshare_rl.adapters import Adapter, LowRank

Matrix = npt.NDArray[np.float64]
Pair = tuple[Matrix, Matrix]  # b [out, r], a [r, in], scale folded in


def pair(factors: LowRank) -> Pair:
    return factors.scale * factors.b.double().numpy(), factors.a.double().numpy()


def dense(factors: LowRank) -> Matrix:
    b, a = pair(factors)
    return np.asarray(b @ a)


def canonical(b: Matrix, a: Matrix) -> Pair:
    u, s, vh = np.linalg.svd(b @ a, full_matrices=False)
    rank = b.shape[1]
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def truncated(matrix: Matrix, rank: int) -> Matrix:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vh[:rank])


def rebuilt(method: str, pairs: list[Pair], k: int, p: int | None = None) -> list[Matrix]:
    """Every task's correction after one decomposition."""
    if method == "delta":
        flat = np.stack([(b @ a).ravel() for b, a in pairs])
        _, _, vh = np.linalg.svd(flat, full_matrices=False)
        out, into = pairs[0][0].shape[0], pairs[0][1].shape[1]
        return [(row @ vh[:k].T @ vh[:k]).reshape(out, into) for row in flat]
    if method == "share":
        pairs = [canonical(b, a) for b, a in pairs]
    left = np.concatenate([b for b, _ in pairs], axis=1)
    right = np.concatenate([a.T for _, a in pairs], axis=1)
    if method == "paper":
        left, right = (side - side.mean(axis=1, keepdims=True) for side in (left, right))
    beta, alpha = (np.linalg.svd(side, full_matrices=False)[0][:, :k] for side in (left, right))
    result = []
    for b, a in pairs:
        if method == "paper":
            eps_b, eps_a = beta.T @ b, alpha.T @ a.T
            core = eps_b[:, :p] @ eps_a[:, :p].T
        else:
            core = beta.T @ b @ a @ alpha
            core = core if p is None else truncated(core, p)
        result.append(beta @ core @ alpha.T)
    return result


def relative_error(estimate: Matrix, truth: Matrix) -> float:
    size = float(np.linalg.norm(truth))
    return float(np.linalg.norm(estimate - truth)) / size if size else 0.0


def adapters(
    count: int, ranks: list[int] | int = 8, out: int = 30, into: int = 40, shared: int = 0, noise: float = 1.0,
    seed: int = 0, layers: int = 1,
) -> dict[str, Adapter]:  # fmt: skip
    """Random adapters; with ``shared > 0`` they lie in that many directions, but for the noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    bases = [(normal(out, shared), normal(shared, into)) for _ in range(layers)]
    made: dict[str, Adapter] = {}
    for task in range(count):
        rank = ranks if isinstance(ranks, int) else ranks[task % len(ranks)]
        made[f"task{task}"] = {
            f"layer{index}": LowRank(
                normal(rank, shared) @ right / max(shared, 1) ** 0.5 + noise * normal(rank, into),
                left @ normal(shared, rank) / max(shared, 1) ** 0.5 + noise * normal(out, rank),
                scale=0.5 + task % 3,
            )
            for index, (left, right) in enumerate(bases)
        }
    return made


def pairs_of(given: dict[str, Adapter], layer: str = "layer0") -> list[Pair]:
    return [pair(adapter[layer]) for adapter in given.values()]


def measured(share: Any, given: dict[str, Adapter], layer: str = "layer0") -> list[float]:
    """True relative errors of what a model rebuilds."""
    return [
        relative_error(dense(share.rebuild(task)[layer]), dense(adapter[layer])) for task, adapter in given.items()
    ]
