"""Noise of the stochastic layers: fresh at each forward pass, or held until released.

PPO needs the ratio of new to old policy to be 1 before its first step, so the noise a rollout was
collected with must be the noise of the updates on it. Everything else may draw anew at each call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class PenalizedLayer(Protocol):
    """A layer that charges every task for departing from what is shared, in nats."""

    def kl(self) -> Tensor:
        """What each task is charged, ``[T]`` nats: a divergence, or the part of one that means alone have."""


@runtime_checkable
class StochasticLayer(PenalizedLayer, Protocol):
    """A penalised layer that is sampled: it has a posterior over weights per task."""

    noise: tuple[Tensor, ...] | None  # standard normal draws in weight space, when held

    def draw_noise(self) -> tuple[Tensor, ...]:
        """Fresh standard normal noise for one draw of every task's weights."""


def penalized_layers(module: nn.Module) -> Iterator[tuple[str, PenalizedLayer]]:
    """All penalised layers inside ``module``, stochastic ones among them, with their dotted names, in order."""
    for name, child in module.named_modules():
        if isinstance(child, PenalizedLayer):
            yield name, child


def stochastic_layers(module: nn.Module) -> Iterator[tuple[str, StochasticLayer]]:
    """All stochastic layers inside ``module`` with their dotted names, in order."""
    for name, child in module.named_modules():
        if isinstance(child, StochasticLayer):
            yield name, child


def hold_noise(module: nn.Module) -> None:
    """Draw the noise of every stochastic layer once and use it until it is held anew or released."""
    for _, layer in stochastic_layers(module):
        layer.noise = layer.draw_noise()


def release_noise(module: nn.Module) -> None:
    """Go back to fresh noise at each forward pass."""
    for _, layer in stochastic_layers(module):
        layer.noise = None


def noise_state(module: nn.Module) -> dict[str, list[Tensor] | None]:
    """Held noise by layer name, for a checkpoint."""
    return {name: None if layer.noise is None else list(layer.noise) for name, layer in stochastic_layers(module)}


def load_noise_state(module: nn.Module, state: dict[str, list[Tensor] | None]) -> None:
    """Put back what :func:`noise_state` gave."""
    for name, layer in stochastic_layers(module):
        held = state[name]
        assert isinstance(layer, nn.Module)
        device = next(layer.parameters()).device
        layer.noise = None if held is None else tuple(noise.to(device) for noise in held)


@contextmanager
def posterior_mean(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` uses the means of its posteriors; afterwards its mode is as before."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
