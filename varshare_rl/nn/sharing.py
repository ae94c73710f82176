"""Measures of what the tasks of a network share, layer by layer and task by task, read from its weights.

With ``W_i = theta + R_i`` the mean weight of task ``i`` in a layer, over tasks

    mean ||W_i||^2 = ||mean W||^2 + mean ||W_i - mean W||^2

holds exactly, and the share of the first term is what the tasks have in common. Moving a common part from the
residuals into ``theta`` changes neither side. Biases and what is drawn at random do not enter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varshare_rl.nn.layer import TaskLayer, task_layers
from varshare_rl.ops.task_weights import cosines, disagreement, effective_rank, squared_distances

#: Bins of the posteriors' histograms.
BINS = 40


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins from ``low`` to ``high``, with the sums that TensorBoard asks for."""

    low: float
    high: float
    counts: list[float]
    total: float
    squares: float


@dataclass(frozen=True)
class LayerSharing:
    """One layer. ``[T]`` tensors are float64 on the CPU; None: the layer has no such thing.

    Attributes:
        name: dotted name, ``<module>.<layer>``.
        rows, columns: of the weight, ``G`` and ``F``.
        nats: divergence of each task's posterior from its prior, ``[T]``.
        theta_square: ``||theta||^2``; None where nothing is shared.
        mean_square: ``mean over i of ||W_i||^2``.
        gram: ``<R_i, R_j>``, ``[T, T]``.
        sigma: root of the mean over entries of ``Var(W_i)``, ``[T]``.
        effective_rank: of ``R_i``, ``[T]``; see :func:`varshare_rl.ops.task_weights.effective_rank`.
        histograms: of the posterior's parameters, all tasks together, by name.
    """

    name: str
    rows: int
    columns: int
    nats: Tensor | None
    theta_square: float | None
    mean_square: float
    gram: Tensor
    sigma: Tensor | None
    effective_rank: Tensor
    histograms: dict[str, Histogram]

    @property
    def residual_norm(self) -> Tensor:
        """``||R_i||``, ``[T]``."""
        return self.gram.diagonal().clamp_min(0.0).sqrt()

    @property
    def residual(self) -> Tensor | None:
        """``||R_i|| / ||theta||``, ``[T]``; None where there is no ``theta`` to compare with."""
        return self.residual_norm / math.sqrt(self.theta_square) if self.theta_square else None

    @property
    def relative_sigma(self) -> Tensor | None:
        """``sigma`` over the root mean square entry of ``theta``, ``[T]``: noise against shared weight."""
        if self.sigma is None or not self.theta_square:
            return None
        return self.sigma / math.sqrt(self.theta_square / (self.rows * self.columns))

    @property
    def sharing(self) -> float:
        """``||mean W||^2 / mean ||W_i||^2``: 1 if all tasks have the same weight."""
        return _share(float(disagreement(self.gram)), self.mean_square)


@dataclass(frozen=True)
class Sharing:
    """All layers of an agent that have weights per task; at least one."""

    layers: list[LayerSharing]

    @property
    def sharing(self) -> float:
        """:attr:`LayerSharing.sharing` with the weights of all layers as one vector."""
        apart = sum(float(disagreement(layer.gram)) for layer in self.layers)
        return _share(apart, sum(layer.mean_square for layer in self.layers))

    @property
    def nats(self) -> Tensor | None:
        """Nats of each task over all layers, ``[T]``; None without posteriors."""
        known = [layer.nats for layer in self.layers if layer.nats is not None]
        return torch.stack(known).sum(0) if known else None

    @property
    def residual(self) -> Tensor | None:
        """``||R_i|| / ||theta||`` with the weights of all layers as one vector, ``[T]``."""
        known = [layer for layer in self.layers if layer.theta_square is not None]
        if not known:
            return None
        squares = torch.stack([layer.gram.diagonal() for layer in known]).sum(0).clamp_min(0.0)
        return (squares / sum(layer.theta_square or 0.0 for layer in known)).sqrt()

    @property
    def relative_sigma(self) -> Tensor | None:
        """Root mean square deviation over that of ``theta``'s entries, all layers as one vector, ``[T]``."""
        variance, square = torch.zeros(len(self.layers[0].gram), dtype=torch.float64), 0.0
        for layer in self.layers:
            if layer.sigma is not None and layer.theta_square is not None:
                variance += layer.sigma.square() * (layer.rows * layer.columns)
                square += layer.theta_square
        return (variance / square).sqrt() if square > 0 else None

    def similarity(self) -> Tensor:
        """Cosine of the tasks' residuals, the layers' inner products added, ``[T, T]``; NaN beside a zero residual.

        Residuals that are tiny still have a direction, and it is noise: read this beside :meth:`distance`, which is
        near 0 for them. Moving a part that all tasks have from the residuals into ``theta`` changes it.
        """
        return cosines(self._gram())

    def distance(self) -> Tensor:
        """``||W_i - W_j|| / root mean square over tasks of ||W_i||`` in the layer where it is largest, ``[T, T]``.

        0: the same weights. About ``sqrt(2)``: weights that have nothing to do with each other. One layer is enough
        for two tasks to behave differently, and a head is small beside the rest.
        """
        distances = [
            (squared_distances(layer.gram) / layer.mean_square).sqrt()
            if layer.mean_square > 0
            else layer.gram * 0.0
            for layer in self.layers
        ]
        return torch.stack(distances).amax(0)

    def _gram(self) -> Tensor:
        return torch.stack([layer.gram for layer in self.layers]).sum(0)


@torch.no_grad()
def measure_sharing(modules: Mapping[str, nn.Module]) -> Sharing | None:
    """Measure every layer with weights per task in the networks ``modules``; None if there is none.

    Reads parameters only: no forward pass, no random number. Costs a few small products per layer.
    """
    measured = (
        measure_layer(f"{name}.{path}", layer)
        for name, module in modules.items()
        for path, layer in task_layers(module)
    )
    layers = [layer for layer in measured if layer is not None]
    return Sharing(layers) if layers else None


@torch.no_grad()
def measure_layer(name: str, layer: TaskLayer) -> LayerSharing | None:
    """The measures of one layer, see :class:`LayerSharing`; None for a layer without weights per task."""
    weights = layer.task_weights()
    if weights is None:
        return None
    _, rows, columns = weights.shape
    gram, products = weights.residual_gram(), weights.theta_products()
    theta_square = None if weights.theta is None else float(weights.theta.double().square().sum())
    mean_square = (theta_square or 0.0) + float(2.0 * products.mean() + gram.diagonal().mean())
    variance = weights.mean_variance()
    return LayerSharing(
        name=name,
        rows=rows,
        columns=columns,
        nats=layer.kl().double().cpu() if layer.penalized else None,
        theta_square=theta_square,
        mean_square=max(mean_square, 0.0),
        gram=gram.cpu(),
        sigma=None if variance is None else variance.sqrt().cpu(),
        effective_rank=effective_rank(weights.singular_values()).cpu(),
        histograms={key: _histogram(values) for key, values in weights.posterior().items()},
    )


def _histogram(values: Tensor) -> Histogram:
    low, high = (float(end) for end in torch.aminmax(values))
    low, high = (low, high) if high > low else (low - 1e-6 - abs(low) * 1e-3, low + 1e-6 + abs(low) * 1e-3)
    counts = torch.histc(values.float().cpu(), BINS, low, high)
    wide = values.double()
    return Histogram(low, high, counts.tolist(), float(wide.sum()), float(wide.square().sum()))


def _share(apart: float, mean_square: float) -> float:
    return 1.0 - apart / mean_square if mean_square > 0 else 1.0
