"""Draws of weights that a policy acts with, and the same draws again for its updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from varshare_rl.nn.stochastic import Noise, RowNoise, WeightNoise, drawn_layers, holding, posterior_mean
from varshare_rl.state import Stateful


class Resample(Enum):
    """Time that a policy acts with one draw of its weights."""

    mean = "mean"  # no draw: the posterior mean
    per_update = "per_update"  # one draw per task until the next update
    per_episode = "per_episode"  # one per environment and episode: Thompson sampling over policies
    per_step = "per_step"  # one per environment and step


class WeightSampler(Stateful):
    """Draws of weights that a policy acts with, and the same draws again for its updates.

    Args:
        mode: see :class:`Resample`.
        module: the policy.
        num_tasks: ``T``.
        envs_per_task: ``E``, environments that act side by side.
        recorded: keep what :meth:`replay` needs, until :meth:`resample`.
    """

    #: Checkpoints of earlier versions have no "stale": their draws are fresh.
    state_fields = ("values", "index", "tasks", "stale=_resample_due?")

    def __init__(
        self, mode: Resample, module: nn.Module, num_tasks: int, envs_per_task: int, recorded: bool = False
    ) -> None:
        self.module, self.recorded = module, recorded
        self.layers = dict(drawn_layers(module))
        self.mode = mode if self.layers else Resample.mean
        self.shape = (num_tasks, envs_per_task)
        self._acted = 0  # environments of every task that have acted in this vector step
        self._rows: list[Tensor] = []  # per_step: the noise of those, [T, width, sizes]
        self.values: dict[str, tuple[Tensor, ...]] = {}  # of each layer: per task, or of all draws so far
        self.index = torch.arange(num_tasks * envs_per_task).view(self.shape)  # the draw of each environment
        self.tasks = self.index.flatten() // envs_per_task  # the task of each draw
        self._draw()

    def sample(self, envs: int) -> AbstractContextManager[None]:
        """Have the policy act, inside, for the next ``envs`` environments of every task, ``[T, envs, ...]``."""
        first, self._acted = self._acted, self._acted + envs
        if self.mode is Resample.per_step:
            self._rows.append(self._row_noise(envs))
            return self._replay_rows(self._rows[-1])
        if self.mode is Resample.per_episode:
            return self._replay_index(self.index[:, first : self._acted])
        return self.replay(None)

    def record(self, done: Tensor) -> Tensor | None:
        """End a vector step, with ``done [T, E]``; new episodes get new draws.

        Returns what :meth:`replay` needs for the step: the draws' numbers ``[T, E]`` (per episode), the noise
        ``[T, E, size]`` (per step), or None.
        """
        self._acted = 0
        if self.mode is Resample.per_step:
            noise = torch.cat(self._rows, dim=1) if self.recorded else None
            self._rows.clear()
            return noise
        if self.mode is not Resample.per_episode:
            return None
        used = self.index.clone() if self.recorded else None
        self.end(done)
        return used

    def end(self, done: Tensor) -> None:
        """Give new draws to the episodes that begin, where those ``done [T, E]`` have ended."""
        if self.mode is Resample.per_episode:
            self._redraw(done.cpu())

    @contextmanager
    def replay(self, draws: Tensor | None) -> Iterator[None]:
        """Have the policy see, inside, rows ``[T, B, ...]`` under the draws it acted with, see :meth:`record`."""
        context: AbstractContextManager[Any]
        if not self.layers:
            context = nullcontext()
        elif self.mode is Resample.mean:
            context = posterior_mean(self.module)
        elif self.mode is Resample.per_update:
            if self._resample_due:  # not before: several updates in a row need one draw
                self._draw()
            context = holding(self.layers, {name: WeightNoise(noise) for name, noise in self.values.items()})
        else:
            assert draws is not None, "draws per episode and per step must be recorded to be replayed"
            context = self._replay_index(draws) if self.mode is Resample.per_episode else self._replay_rows(draws)
        with context:
            yield

    def resample(self) -> None:
        """Draw anew per task before acting again, after an update; forget the draws of episodes that have ended."""
        if self.mode is Resample.per_update:
            self._resample_due = True
        elif self.mode is Resample.per_episode and self.recorded:
            current = self.index.flatten()
            self.values = {
                name: tuple(value[current.to(value.device)] for value in values)
                for name, values in self.values.items()
            }
            self.tasks = self.tasks[current]
            self.index = torch.arange(len(current)).view(self.shape)

    def bytes_per_step(self) -> int:
        """Return the size of what :meth:`record` returns for one environment, in bytes."""
        sizes = {Resample.per_episode: 8, Resample.per_step: 4 * self._row_size()}
        return sizes.get(self.mode, 0) if self.recorded else 0

    def memory_bytes(self, vector_steps: int, horizon: int) -> int:
        """Predict the bytes of the draws that are held after so many vector steps without :meth:`resample`.

        For episodes of ``horizon`` steps; recorded, every episode that ends sooner adds a draw to them.
        """
        one = sum(value[0].nbytes for values in self.values.values() for value in values)
        if self.mode is not Resample.per_episode:
            return one * self.shape[0]  # there are none unless they are per update
        kept = 1 + -(-vector_steps // horizon) if self.recorded else 1
        return one * self.index.numel() * kept

    def _draw(self) -> None:
        self._resample_due = False
        counts = {Resample.per_update: self.shape[0], Resample.per_episode: self.index.numel()}
        if self.mode in counts:
            self.values = {name: layer.draw_noise(counts[self.mode]) for name, layer in self.layers.items()}

    def _redraw(self, done: Tensor) -> None:
        """Give the environments ``done [T, E]`` new draws: appended when recorded, else in place of the old."""
        ended = done.flatten().nonzero().flatten()
        if len(ended) == 0:
            return
        for name, layer in self.layers.items():
            fresh = layer.draw_noise(len(ended))
            old = self.values[name]
            if self.recorded:
                self.values[name] = tuple(torch.cat(pair) for pair in zip(old, fresh, strict=True))
            else:
                for value, new in zip(old, fresh, strict=True):
                    value[ended.to(value.device)] = new
        if self.recorded:
            self.index.view(-1)[ended] = torch.arange(len(ended)) + len(self.tasks)
            self.tasks = torch.cat([self.tasks, ended // self.shape[1]])

    def _replay_index(self, index: Tensor) -> AbstractContextManager[None]:
        noise: dict[str, Noise] = {
            name: WeightNoise(values, index, self.tasks) for name, values in self.values.items()
        }
        return holding(self.layers, noise)

    def _row_noise(self, envs: int) -> Tensor:
        like = next(self.module.parameters())
        return like.new_empty(self.shape[0], envs, self._row_size()).normal_()

    def _row_size(self) -> int:
        return sum(sum(layer.row_noise_sizes()) for layer in self.layers.values())

    def _replay_rows(self, noise: Tensor) -> AbstractContextManager[None]:
        sizes = [size for layer in self.layers.values() for size in layer.row_noise_sizes()]
        parts = iter(torch.split(noise, sizes, dim=-1))
        held: dict[str, Noise] = {
            name: RowNoise(tuple(next(parts) for _ in layer.row_noise_sizes()))
            for name, layer in self.layers.items()
        }
        return holding(self.layers, held)


@contextmanager
def drawn_once(module: nn.Module) -> Iterator[None]:
    """Have all training passes of ``module`` inside use one draw of every task's weights, made here.

    For layers that would draw one set per task and pass (``estimator=weight`` with one sample); others, and
    layers whose noise is held already, draw as they do. Noise is a large part of what a posterior costs.
    """
    layers = [
        layer
        for _, layer in drawn_layers(module)
        if layer.estimator == "weight" and layer.weight_samples == 1 and layer.noise is None
    ]
    for layer in layers:
        layer.noise = WeightNoise(layer.draw_noise(layer.num_tasks))
    try:
        yield
    finally:
        for layer in layers:
            layer.noise = None
